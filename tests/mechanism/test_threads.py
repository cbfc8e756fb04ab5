"""Several patches of one model: threads, asynchronous tasks, blocks in any order, running calls."""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
import threading
import time
from contextlib import ExitStack

import pytest
import torch
import transformers

import vtoken
from tests.models import FAMILIES
from vtoken.patching import patch_of

from .common import run
from .test_isolation import traces

# before the LLM, inside it, inside the tower, in the tower's attention
STRATEGIES = ["uniform", "fastv", "mustdrop", "visionzip"]


class Subject:
    """A model, its inputs, and the answer under every strategy, computed alone."""

    def __init__(self, name: str = "llava", strategies=STRATEGIES, kind: str = "one", steps: int = 3) -> None:
        family = FAMILIES[name]
        self.model, self.inputs, self.steps = family.build(), family.batch(kind), steps
        self()
        self.traced = traces(self.model)
        self.alone = {"dense": self()}
        for strategy in strategies:
            with vtoken.applied(family.build(), strategy, budget=0.3) as other:
                self.alone[strategy] = self(other)
        assert len({a.double().sum().item() for a in self.alone.values()}) == len(strategies) + 1

    def __call__(self, model=None) -> torch.Tensor:
        return torch.stack(run(self.model if model is None else model, self.inputs, self.steps).logits)

    def reads(self) -> str:
        """Which of the answers the model gives here."""
        got = self()
        return next((name for name, want in self.alone.items() if torch.equal(got, want)), "none of them")

    def check_clean(self) -> None:
        assert self.reads() == "dense"
        assert traces(self.model) == self.traced


@pytest.fixture
def subject() -> Subject:
    return Subject()


def together(*jobs) -> None:
    """Run jobs in threads of their own; the first error is raised here."""
    errors: list[BaseException] = []

    def guarded(job) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    [t.start() for t in threads]
    [t.join(300) for t in threads]
    assert not any(t.is_alive() for t in threads), "threads wait for each other"
    if errors:
        raise errors[0]


# -- several threads -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("before", [None, "visionzip"])
def test_blocks_of_two_threads_at_the_same_time(subject, before):
    if before:
        vtoken.patch(subject.model, before, budget=0.3)
    barrier = threading.Barrier(2, timeout=60)

    def job(strategy):
        for _ in range(2):
            with vtoken.applied(subject.model, strategy, budget=0.3):
                barrier.wait()
                assert subject.reads() == strategy
                assert vtoken.report(subject.model).strategy.startswith(strategy)
                with vtoken.disabled(subject.model):
                    assert subject.reads() == "dense"
                assert subject.reads() == strategy

    together(lambda: job("fastv"), lambda: job("mustdrop"))
    assert subject.reads() == (before or "dense")
    vtoken.unpatch(subject.model)
    subject.check_clean()


def test_frames_that_reuse_in_two_threads():
    """A strategy that replaces `forward` of the tower's layers, taken off under one that came later."""
    subject = Subject("llava_onevision/video", ["stc_cacher", "uniform"])
    entered, left = threading.Event(), threading.Event()

    def first():
        with vtoken.applied(subject.model, "stc_cacher", budget=0.3):
            entered.wait(60)
            assert subject.reads() == "stc_cacher"
        left.set()

    def second():
        with (
            vtoken.applied(subject.model, "uniform", budget=0.3),
            vtoken.applied(subject.model, "stc_cacher", budget=0.3),
        ):
            entered.set()
            assert subject.reads() == "stc_cacher"
            left.wait(60)
            assert subject.reads() == "stc_cacher"

    together(first, second)
    subject.check_clean()


def churn(subject: Subject, answers: int, readers: int, strategies=("fastv", "mustdrop")) -> None:
    """Patch and unpatch while each of the readers generates so many answers: every one is of one of the
    strategies or dense.
    """
    reading, allowed = [readers], {"dense", *strategies}

    def change():
        for strategy in itertools.cycle(strategies):
            vtoken.patch(subject.model, strategy, budget=0.3)
            time.sleep(random.random() / 100)
            vtoken.unpatch(subject.model)
            if not reading[0]:
                return

    def read():
        try:
            for _ in range(answers):
                assert subject.reads() in allowed
        finally:
            reading[0] -= 1

    together(change, *[read] * readers)
    vtoken.unpatch(subject.model)
    subject.check_clean()


def test_patch_and_unpatch_while_another_thread_generates(subject):
    churn(subject, 8, 1)


def test_a_call_finishes_with_the_patch_that_it_began_with(subject):
    """Patched, replaced and unpatched between two tokens."""
    changes = [
        lambda: vtoken.unpatch(subject.model),
        lambda: vtoken.patch(subject.model, "mustdrop", budget=0.3),
        lambda: vtoken.unpatch(subject.model),
    ]

    class Change(transformers.LogitsProcessor):
        def __init__(self, changes):
            self.left = list(changes)

        def __call__(self, ids, scores):
            if self.left:
                self.left.pop(0)()
            return scores

    for before, want in (("fastv", "fastv"), (None, "dense")):
        if before:
            vtoken.patch(subject.model, before, budget=0.3)
        now = Change(changes if before else changes[1:])
        out = run(subject.model, subject.inputs, 3, logits_processor=[now])
        assert torch.equal(torch.stack(out.logits), subject.alone[want])
        vtoken.unpatch(subject.model)
        subject.check_clean()


@pytest.mark.parametrize("how", ["patch", "applied"])
def test_a_generate_that_began_before_the_patch_stays_dense(subject, how):
    """It was about to encode its images when another thread patched the model, or entered a block."""
    base, got = subject.model.base_model, []
    about, patched, done = (threading.Event() for _ in range(3))
    original = base.get_image_features

    def waiting(*args, **kwargs):
        del base.get_image_features
        about.set()
        assert patched.wait(60)
        return base.get_image_features(*args, **kwargs)

    def read():
        got.append(subject.reads())
        done.set()
        got.append(subject.reads())

    def change():
        assert about.wait(60)
        with ExitStack() as stack:
            if how == "patch":
                vtoken.patch(subject.model, "fastv", budget=0.3)
            else:
                stack.enter_context(vtoken.applied(subject.model, "fastv", budget=0.3))
            patched.set()
            assert done.wait(60)
            thread.join(60)

    waiting.__wrapped__ = original
    base.get_image_features = waiting
    thread = threading.Thread(target=read)
    thread.start()
    together(change)
    assert got == ["dense", "fastv"]
    vtoken.unpatch(subject.model)
    subject.check_clean()


def test_a_thread_without_a_block_takes_part_in_the_only_one_and_asks_for_one_where_there_are_two(subject):
    barrier, asked = threading.Barrier(3, timeout=60), threading.Barrier(3, timeout=60)

    def job(strategy):
        with vtoken.applied(subject.model, strategy, budget=0.3):
            barrier.wait()
            asked.wait()

    def other():
        barrier.wait()
        try:
            with pytest.raises(RuntimeError, match="2 other threads are inside"):
                subject()
            with vtoken.disabled(subject.model):
                assert subject.reads() == "dense"
            with vtoken.applied(subject.model, "uniform", budget=0.3):
                assert subject.reads() == "uniform"
        finally:
            asked.wait()

    together(lambda: job("fastv"), lambda: job("mustdrop"), other)
    with (
        vtoken.applied(subject.model, "fastv", budget=0.3),
        vtoken.applied(subject.model, "mustdrop", budget=0.3),
    ):
        got = []
        together(lambda: got.append(subject.reads()))
        assert got == ["mustdrop"]
    subject.check_clean()


def test_unpatch_and_patch_while_another_thread_has_a_block(subject):
    inside, go = threading.Event(), threading.Event()

    def job():
        with vtoken.applied(subject.model, "fastv", budget=0.3):
            inside.set()
            go.wait(60)
            assert subject.reads() == "fastv"

    def other():
        inside.wait(60)
        try:
            with pytest.raises(RuntimeError, match="Another thread is inside"):
                vtoken.unpatch(subject.model)
            with pytest.raises(ValueError, match="patched with fastv already"):
                vtoken.patch(subject.model, "uniform")
        finally:
            go.set()

    together(job, other)
    subject.check_clean()


def test_two_threads_patch_at_once(subject):
    barrier, won = threading.Barrier(4, timeout=60), []

    def job():
        barrier.wait()
        try:
            won.append(vtoken.patch(subject.model, "fastv", budget=0.3))
        except ValueError as error:
            assert "patched with fastv already" in str(error)

    together(*[job] * 4)
    assert len(won) == 1 and subject.reads() == "fastv"
    vtoken.unpatch(subject.model)
    subject.check_clean()


@pytest.mark.slow
def test_many_threads():
    """Blocks, nested blocks, patches and calls of eight threads on one model, for all kinds of strategies."""
    subject = Subject()

    def job(seed):
        chance = random.Random(seed)
        for _ in range(10):
            with ExitStack() as stack:
                names = [chance.choice([*STRATEGIES, "dense"]) for _ in range(chance.randint(1, 3))]
                for name in names:
                    block = vtoken.disabled(subject.model) if name == "dense" else None
                    stack.enter_context(block or vtoken.applied(subject.model, name, budget=0.3))
                assert subject.reads() == names[-1]

    together(*[lambda seed=seed: job(seed) for seed in range(8)])
    subject.check_clean()
    churn(subject, 4, 3, STRATEGIES)


# -- nesting and order ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("before", [None, "visionzip"])
@pytest.mark.parametrize(
    "blocks", list(itertools.permutations(["fastv", "dense", "mustdrop"])) + [("dense", "dense", "fastv")]
)
def test_the_innermost_block_counts(subject, blocks, before):
    """Entered one by one and left one by one, in order and from the outside in."""
    if before:
        vtoken.patch(subject.model, before, budget=0.3)
    for leave in (-1, 0):
        opened = []
        for name in blocks:
            block = (
                vtoken.disabled(subject.model)
                if name == "dense"
                else vtoken.applied(subject.model, name, budget=0.3)
            )
            block.__enter__()
            opened.append((name, block))
            assert subject.reads() == name
        while opened:
            opened.pop(leave)[1].__exit__(None, None, None)
            assert subject.reads() == (opened[-1][0] if opened else before or "dense")
    vtoken.unpatch(subject.model)
    subject.check_clean()


def test_generators_that_are_given_up(subject):
    def answers(strategy):
        with vtoken.applied(subject.model, strategy, budget=0.3):
            while True:
                yield subject.reads()

    first, second = answers("fastv"), answers("mustdrop")
    assert next(first) == "fastv" and next(second) == "mustdrop"
    first.close()
    assert subject.reads() == "mustdrop"
    thread = threading.Thread(target=second.close)  # as the garbage collector may do
    thread.start()
    thread.join()
    subject.check_clean()


def test_exceptions_and_interrupts(subject):
    vtoken.patch(subject.model, "visionzip", budget=0.3)
    for error in (ZeroDivisionError, KeyboardInterrupt, GeneratorExit):
        layer = subject.model.get_decoder().layers[1]

        def fail(module, args, error=error):
            raise error

        handle = layer.register_forward_pre_hook(fail)
        for call in (subject, lambda: subject.model(**subject.inputs)):
            with (
                pytest.raises(error),
                vtoken.applied(subject.model, "fastv", budget=0.3),
                vtoken.disabled(subject.model),
            ):
                call()
            with pytest.raises(error):
                call()
        handle.remove()
        assert subject.reads() == "visionzip"
        handle = layer.register_forward_pre_hook(fail)
        with pytest.raises(error):
            subject.model(**subject.inputs)
        handle.remove()
    vtoken.unpatch(subject.model)
    subject.check_clean()


def test_asynchronous_tasks(subject):
    async def job(strategy):
        with vtoken.applied(subject.model, strategy, budget=0.3):
            for _ in range(3):
                await asyncio.sleep(0)
                assert subject.reads() == strategy
            assert await asyncio.to_thread(subject.reads) == strategy

    async def everything():
        await asyncio.gather(job("fastv"), job("mustdrop"), job("uniform"))

    asyncio.run(everything())
    subject.check_clean()


def test_the_same_patch_goes_on_after_a_block(subject):
    vtoken.patch(subject.model, "visionzip", budget=0.3)
    assert subject.reads() == "visionzip"
    patch, report = patch_of(subject.model), str(vtoken.report(subject.model))
    with vtoken.applied(subject.model, "uniform", budget=0.5):
        assert patch_of(subject.model) is not patch
        with pytest.raises(ValueError, match="has not read visual tokens"):
            vtoken.report(subject.model)
        subject()
        assert vtoken.report(subject.model).strategy.startswith("uniform")
    assert patch_of(subject.model) is patch and str(vtoken.report(subject.model)) == report
    vtoken.unpatch(subject.model)
    subject.check_clean()


def test_a_stream_goes_on_after_a_block():
    """Streams with and without a block between their turns: the same frames are references, the answers are
    the same.
    """
    subject, answers = Subject("llava_onevision/video", ["stc_cacher"]), []
    for block in (False, True):
        state = vtoken.StreamState()
        vtoken.patch(subject.model, "stc_cacher", budget=0.3)
        for turn in range(3):
            if block and turn:
                with vtoken.applied(subject.model, "uniform", budget=0.3):
                    subject()
            with vtoken.stream(subject.model, state):
                answers.append((subject(), state.last.recomputed))
        assert state.frames == 3 * len(state.last.tokens)
        vtoken.unpatch(subject.model)
    for (got, counts), (want, expected) in zip(answers[:3], answers[3:]):
        assert torch.equal(got, want) and counts == expected
    assert answers[0][1] != answers[1][1]  # the stream matters


def test_unpatch_and_patch_inside_blocks(subject):
    vtoken.patch(subject.model, "visionzip", budget=0.3)
    with vtoken.applied(subject.model, "fastv", budget=0.3):
        vtoken.unpatch(subject.model)
        assert subject.reads() == "dense" and patch_of(subject.model) is None
        vtoken.patch(subject.model, "mustdrop", budget=0.3)
        assert subject.reads() == "mustdrop"
    assert subject.reads() == "visionzip"
    with vtoken.disabled(subject.model):
        vtoken.unpatch(subject.model)
        vtoken.patch(subject.model, "fastv", budget=0.3)
        assert subject.reads() == "dense"
    assert subject.reads() == "fastv"
    vtoken.unpatch(subject.model)
    with vtoken.disabled(subject.model):
        vtoken.patch(subject.model, "fastv", budget=0.3)
        assert subject.reads() == "dense"
        vtoken.unpatch(subject.model)
    subject.check_clean()


def test_what_stood_in_place_of_a_method_comes_back(subject):
    """Instance attributes of others, set before the patch and on top of it."""
    base = subject.model.base_model
    original, calls = base.get_image_features, []

    def mine(*args, **kwargs):
        calls.append("before")
        return original(*args, **kwargs)

    mine.__wrapped__ = original
    base.get_image_features = mine
    vtoken.patch(subject.model, "fastv", budget=0.3)
    with vtoken.applied(subject.model, "mustdrop", budget=0.3):
        assert subject.reads() == "mustdrop"
    assert subject.reads() == "fastv" and calls
    vtoken.unpatch(subject.model)
    assert base.__dict__["get_image_features"] is mine
    del base.get_image_features
    vtoken.patch(subject.model, "fastv", budget=0.3)
    patched = base.get_image_features

    def later(*args, **kwargs):
        return patched(*args, **kwargs)

    later.__wrapped__ = patched
    base.get_image_features = later
    assert subject.reads() == "fastv"
    vtoken.unpatch(subject.model)
    assert subject.reads() == "dense" and base.__dict__["get_image_features"] is later
    del base.get_image_features
    subject.check_clean()


def test_copies_made_inside_blocks(subject):
    vtoken.patch(subject.model, "visionzip", budget=0.3)
    with vtoken.applied(subject.model, "fastv", budget=0.3), vtoken.disabled(subject.model):
        other = copy.deepcopy(subject.model)
        assert torch.equal(subject(other), subject.alone["fastv"])
    assert torch.equal(subject(other), subject.alone["fastv"])
    with vtoken.applied(other, "uniform", budget=0.3):
        assert subject.reads() == "visionzip"
        assert torch.equal(subject(other), subject.alone["uniform"])
    vtoken.unpatch(other)
    assert torch.equal(subject(other), subject.alone["dense"])
    assert traces(other) == subject.traced
    vtoken.unpatch(subject.model)
    subject.check_clean()
