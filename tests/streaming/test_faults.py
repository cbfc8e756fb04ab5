"""Bad input, a full disk, `reset` or `close` during questions: one sentence, an unchanged session."""

from __future__ import annotations

import errno
import os
import resource
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

import vtoken
from tests.streaming.common import frames_of, model_of
from tests.streaming.test_session import SHORT, Q, fed, logits_of, session_of
from vtoken.streaming.calls import Calls

NAN, INF = float("nan"), float("inf")
FRAME = frames_of(1)[0]
NO_PICTURES = [
    None,
    "clip.mp4",
    7,
    b"",
    [[[0, 0, 0]]],
    torch.empty(28, 28, 3, dtype=torch.uint8, device="meta"),
    FRAME[..., 0],
    FRAME[..., :2],
    np.concatenate([FRAME, FRAME[..., :1]], -1),
    FRAME.transpose(2, 0, 1),
    FRAME[None],
    FRAME.astype(np.float32),
    np.full((28, 42, 3), NAN, np.float64),
    torch.full((28, 42, 3), NAN),
    torch.zeros(28, 42, 3, dtype=torch.bfloat16),
    torch.zeros(28, 42, 3, requires_grad=True),
]
NO_PIXELS = [
    np.zeros((0, 0, 3), np.uint8),
    np.zeros((0, 42, 3), np.uint8),
    np.zeros((1, 201, 3), np.uint8),
    np.zeros((1, 40, 3), np.uint8),  # processors would take the height for channels
    np.zeros((3, 40, 3), np.uint8),
    np.broadcast_to(np.zeros(3, np.uint8), (2**14, 2**14, 3)),
    torch.zeros(28, 0, 3, dtype=torch.uint8),
    Image.new("RGB", (0, 5)),
]
NO_TIMES = ["1", [1.0], True, 1j, np.array([1.0, 2.0]), torch.ones(2)]


def one_sentence(error: BaseException) -> None:
    text = str(error)
    assert text and "\n" not in text and text.count(". ") == 0 and "Traceback" not in text, text


@contextmanager
def refused(kind):
    with pytest.raises(kind) as caught:
        yield
    one_sentence(caught.value)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param("llava_onevision", "stc"),
        pytest.param("qwen2_5_vl", None),
        pytest.param("llava_onevision", None, marks=pytest.mark.product),
        pytest.param("qwen2_5_vl", "stc", marks=pytest.mark.product),
    ],
)
def test_bad_frames_leave_the_session_as_it_was(name, strategy):
    """Also before the first frame, and where the tower waits for a second one; then the stream goes on as if
    untouched.
    """
    frames, options = frames_of(5), {} if strategy is None else dict(strategy=strategy, budget=0.5)
    with session_of(name, **options) as clean:
        fed(clean, frames)
        stats, want = clean.stats, logits_of(clean)
    with session_of(name, **options) as session:
        for i, frame in enumerate(frames):
            for bad in NO_PICTURES:
                with refused(TypeError):
                    session.push(bad, i / 2)
            for bad in NO_PIXELS:
                with refused(ValueError):
                    session.push(bad, i / 2)
            for t in NO_TIMES:
                with refused(TypeError):
                    session.push(frame, t)
            for t in (NAN, INF, -INF, *((i / 2 - 0.5, i / 2 - 3) if i else ())):
                with refused(ValueError):
                    session.push(frame, t)
            session.push(frame, i / 2)
        assert session.stats == stats and torch.equal(logits_of(session), want)


def test_a_first_frame_that_the_processor_cannot_read():
    """Qwen's processor refuses less than 28 pixels a side only when it reads them, a frame later."""
    session = session_of("qwen2_5_vl")
    part, tried = session.processor.video_processor, []

    class Refuses:
        def __getattr__(self, name):
            return getattr(part, name)

        def __call__(self, *args, **kwargs):
            tried.append(1)
            raise ZeroDivisionError("float division by zero\nsomewhere")

    session.frames.processor = type(session.processor).__new__(type(session.processor))
    session.frames.processor.__dict__.update(session.processor.__dict__, video_processor=Refuses())
    with pytest.raises(ValueError, match=r"cannot read a frame of 3 x 2 pixels: float division by zero$"):
        session.push(FRAME[:2, :3], 0.0)
    session.frames.processor = session.processor
    assert tried == [1] and session.stats["frames"] == 0
    fed(session, frames_of(4))
    assert torch.equal(logits_of(session), logits_of(fed(session_of("qwen2_5_vl"), frames_of(4))))


def test_a_step_that_does_not_fit_is_not_in_the_history_either():
    frames = frames_of(6)
    with session_of("llava_onevision", "stc", 0.5, interval=3) as session:
        fed(session, frames[:2])
        room, session.memory.max_tokens = session.memory.max_tokens, 1
        with refused(ValueError):
            session.push(frames[5], 1.0)
        session.memory.max_tokens = room
        for i in range(2, 5):
            session.push(frames[i], i / 2)
        got, computed = logits_of(session), session.state.flops
    with session_of("llava_onevision", "stc", 0.5, interval=3) as clean:
        fed(clean, frames[:5])
        assert torch.equal(got, logits_of(clean)) and computed == clean.state.flops


def test_a_waiting_frame_is_the_sessions_own():
    """A caller who decodes into one buffer changes it before the tower reads the pair."""
    frames, buffer = frames_of(2), np.empty_like(FRAME)
    session = session_of("qwen2_5_vl")
    for i, frame in enumerate(frames):
        buffer[:] = frame
        session.push(buffer, i / 2)
    assert torch.equal(logits_of(session), logits_of(fed(session_of("qwen2_5_vl"), frames)))


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_bad_questions_are_not_counted(name):
    session = fed(session_of(name), frames_of(3))
    want, stats = logits_of(session), session.stats
    for ask in (session.ask, session.stream_answer):
        for text in (None, 7, b"what ?", ["what ?"]):
            with refused(TypeError):
                ask(text)
        for text in ("", " \n", f"{session.frames.token} ?"):
            with refused(ValueError):
                ask(text)
        for t in NO_TIMES:
            with refused(TypeError):
                ask(Q, t=t)
        for t in (NAN, INF, -INF, -1.0):
            with refused(ValueError):
                ask(Q, t=t)
    assert session.stats == stats and torch.equal(logits_of(session), want)
    session.close()
    session.close()
    for call in (lambda: session.ask(Q), lambda: session.stream_answer(Q), lambda: session.push(FRAME, 9.0)):
        with refused(RuntimeError):
            call()


# -- a full disk ---------------------------------------------------------------------------------------------
@contextmanager
def file_limit(size: int):
    """Files end after so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("fault", ["nothing fits", "half fits", "no such folder", "cannot be mapped"])
def test_a_full_disk_leaves_no_file_and_no_frame(fault, tmp_path, monkeypatch):
    frames = frames_of(5)
    options = dict(memory="rekv", max_bytes=10**7, memory_options=dict(n_local=9, topk=2, disk=tmp_path))
    with fed(session_of("llava_onevision", **options), frames) as clean:
        stats, want = clean.stats, logits_of(clean)
    with session_of("llava_onevision", **options) as session:
        for i, frame in enumerate(frames):
            if i in (0, 3):
                with pytest.raises(OSError, match="could not be written") as caught:
                    if fault == "no such folder":
                        monkeypatch.setattr(session.memory, "disk", tmp_path / "gone")
                        session.push(frame, i / 2)
                    elif fault == "cannot be mapped":
                        monkeypatch.setattr(
                            torch, "from_file", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no"))
                        )
                        session.push(frame, i / 2)
                    else:
                        with file_limit(0 if fault == "nothing fits" else 500):
                            session.push(frame, i / 2)
                monkeypatch.undo()
                one_sentence(caught.value)
                assert not list(tmp_path.iterdir()) and session.stats["frames"] == i
            session.push(frame, i / 2)
        assert session.stats == stats and torch.equal(logits_of(session), want)


def test_a_disk_that_says_it_is_full(tmp_path, monkeypatch):
    with session_of("llava_onevision", memory="rekv", memory_options=dict(disk=tmp_path)) as session:

        def full(handle, *args, **kwargs):
            os.close(handle)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fdopen", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            session.push(FRAME, 0.0)
        assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_block_that_does_not_fit_changes_nothing():
    with fed(session_of("llava_onevision", memory="rekv", max_bytes=10**7), frames_of(3)) as session:
        stats, context = session.stats, session.memory.context
        session.memory.max_bytes = 2000
        with refused(ValueError):
            session.push(FRAME, 9.0)
        session.memory.max_bytes = 10**7
        assert session.stats == stats and session.memory.context is context


# -- several threads -----------------------------------------------------------------------------------------
class Holds(StoppingCriteria):
    """Keeps an answer from ending until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        self.begun.set()
        assert self.go.wait(60)
        return torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize("way", ["ask", "stream_answer"])
def test_close_waits_for_an_answer_and_reset_does_not(way):
    session, hold = fed(session_of("llava_onevision", "uniform", 0.5), frames_of(3)), Holds()
    want = session.ask(Q, **SHORT).text
    said: list[str] = []

    def ask() -> None:
        options = SHORT | dict(stopping_criteria=StoppingCriteriaList([hold]))
        said.append(
            session.ask(Q, **options).text if way == "ask" else "".join(session.stream_answer(Q, **options))
        )

    asking = threading.Thread(target=ask)
    asking.start()
    assert hold.begun.wait(60)
    session.reset()
    assert session.stats["frames"] == 0
    session.push(FRAME, 0.0)
    closing = threading.Thread(target=session.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive() and vtoken.patching.patch_of(session.model) is not None
    hold.go.set()
    asking.join(60)
    closing.join(60)
    assert [s.strip() for s in said] == [want] and session.closed
    assert vtoken.patching.patch_of(session.model) is None


def test_an_answer_cannot_close_its_own_session():
    session, seen = fed(session_of("llava_onevision"), frames_of(3)), []

    class Closes(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            with refused(RuntimeError):
                session.close()
            seen.append(1)
            return torch.zeros(1, dtype=torch.bool)

    session.ask(Q, stopping_criteria=StoppingCriteriaList([Closes()]), **SHORT)
    list(session.stream_answer(Q, stopping_criteria=StoppingCriteriaList([Closes()]), **SHORT))
    assert seen and not session.closed
    session.close()


@pytest.mark.parametrize("memory", ["recent", "rekv"])
def test_reset_while_others_ask_and_push(memory):
    """Answers are of the stream before or after; nothing else comes out, and the session works afterwards."""
    session, frames = session_of("llava_onevision", memory=memory), frames_of(3)
    faults: list[BaseException] = []
    done = threading.Event()

    def work(action) -> None:
        while not done.is_set():
            try:
                action()
            except ValueError as error:
                if "push one first" not in str(error) and "order of their times" not in str(error):
                    faults.append(error)
            except BaseException as error:
                faults.append(error)

    def push() -> None:
        for i, frame in enumerate(frames):
            session.push(frame, i / 2)

    actions = [
        push,
        lambda: session.ask(Q, max_new_tokens=1),
        lambda: list(session.stream_answer(Q, max_new_tokens=1)),
    ]
    threads = [threading.Thread(target=work, args=(action,)) for action in actions]
    [t.start() for t in threads]
    for _ in range(15):
        session.reset()
        done.wait(0.02)
    done.set()
    [t.join(60) for t in threads]
    assert not faults and not any(t.is_alive() for t in threads)
    session.reset()
    assert torch.equal(
        logits_of(fed(session, frames)), logits_of(fed(session_of("llava_onevision", memory=memory), frames))
    )


def test_close_while_others_ask_and_push():
    for _ in range(3):
        session, faults = fed(session_of("qwen2_5_vl", "stc_pruner", 0.5), frames_of(3)), []

        def work(action, faults=faults) -> None:
            try:
                while True:
                    action()
            except RuntimeError as error:
                if "closed" not in str(error):
                    faults.append(error)
            except BaseException as error:
                faults.append(error)

        at = iter(range(3, 10**6))

        def push(session=session, at=at) -> None:
            session.push(FRAME, float(next(at)))

        actions = [push, lambda session=session: session.ask(Q, max_new_tokens=1)]
        threads = [threading.Thread(target=work, args=(action,)) for action in actions]
        [t.start() for t in threads]
        session.close()
        [t.join(60) for t in threads]
        assert not faults and not any(t.is_alive() for t in threads)
        assert vtoken.patching.patch_of(model_of("qwen2_5_vl")) is None


def test_a_waiting_owner_goes_before_later_calls():
    calls, order = Calls(), []
    calls.enter()

    def own() -> None:
        with calls.alone("wait"):
            order.append("owner")

    def call() -> None:
        with calls.one():
            order.append("call")

    owner = threading.Thread(target=own)
    owner.start()
    while not calls._waiting:
        pass
    later = threading.Thread(target=call)
    later.start()
    later.join(0.1)
    assert not order
    calls.leave()
    owner.join(60)
    later.join(60)
    assert order == ["owner", "call"]
