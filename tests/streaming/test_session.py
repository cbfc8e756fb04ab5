"""A session's answers are the model's own; it is causal, bounded, and usable while frames arrive."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

import vtoken
from tests.streaming.common import IMAGE, VIDEO, frames_of, model_of, plain_inputs, processor_of

Q = "what is here ?"
SHORT = dict(max_new_tokens=6)


def session_of(name: str, *args, **kwargs) -> vtoken.StreamSession:
    return vtoken.StreamSession(model_of(name), processor_of(name), *args, **({"fps": 2.0} | kwargs))


def fed(session: vtoken.StreamSession, frames: np.ndarray, fps: float = 2.0) -> vtoken.StreamSession:
    for i, frame in enumerate(frames):
        session.push(frame, i / fps)
    return session


def plain(name: str, frames: np.ndarray, question: str = Q):
    """(text, logits of every step) of the model's own generate()."""
    inputs = plain_inputs(name, frames, question)
    out = model_of(name).generate(**inputs, output_logits=True, return_dict_in_generate=True, **SHORT)
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    return processor_of(name).tokenizer.decode(new, skip_special_tokens=True).strip(), torch.stack(out.logits)


def logits_of(session: vtoken.StreamSession, t: float | None = None, question: str = Q) -> torch.Tensor:
    with vtoken.disabled(session.model):
        arguments = session._take(question, t).prompt.arguments
        out = session.model.generate(**arguments, output_logits=True, return_dict_in_generate=True, **SHORT)
    return torch.stack(out.logits)


@pytest.mark.parametrize("name", VIDEO + IMAGE)
def test_answer_is_the_models_own_where_everything_is_kept(name, sighted):
    """Every family, through its real processor, an odd number of frames included (the towers of Qwen join
    two).
    """
    for count in (2,) if name == "llava_next" else (5, 4):
        frames = frames_of(count)
        text, logits = plain(name, frames)
        with fed(session_of(name), frames) as session:
            answer = session.ask(Q, **SHORT)
            # frames pass the tower one by one, not as a batch
            assert torch.allclose(logits_of(session), logits, atol=1e-5)
        assert answer.text == text
        assert answer.frames_used == tuple(i / 2 for i in range(count))
        assert (answer.time, answer.new_tokens) == ((count - 1) / 2, 6)
        assert answer.tokens == plain_inputs(name, frames, Q)["input_ids"].shape[1]
    assert not np.array_equal(logits, plain(name, frames_of(count, seed=1))[1])  # the frames matter
    sighted(name, "streaming")


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "video_llava", "llava", "internvl"])
@pytest.mark.parametrize("positions", ["original", "renumber"])
def test_pruned_stream_is_the_patched_model(name, positions):
    """A strategy that treats every frame alike gives the same prompt frame by frame as on the whole video."""
    if positions == "renumber" and name.startswith("qwen"):
        pytest.skip("multimodal rope is not renumbered")
    frames, model = frames_of(4), model_of(name)
    options = dict(strategy="uniform", budget=0.5, positions=positions)
    with vtoken.applied(model, **options):
        text, logits = plain(name, frames)
        assert vtoken.report(model).tokens_out < vtoken.report(model).tokens_in
    with fed(session_of(name, **options), frames) as session:
        assert session.ask(Q, **SHORT).text == text
        assert torch.allclose(logits_of(session), logits, atol=1e-4)
        assert session.stats["tokens"] < sum(s.rows for s in session.memory.view())
    assert vtoken.patching.patch_of(model) is None
    assert not torch.allclose(logits, plain(name, frames)[1], atol=1e-2)


@pytest.mark.parametrize("strategy", ["evs", "v_cast", "flashvid", "vidcom2"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_methods_for_videos_keep_their_share_of_every_step(name, strategy):
    """evs keeps the first step of a stream whole, and goes on from the step before."""
    options = dict(expansion=1.0) if strategy == "flashvid" else {}
    with fed(session_of(name, strategy, 0.5, **options), frames_of(6)) as session:
        steps = [(len(s.kept), s.rows) for s in session.memory.view()]
        assert session.ask(Q, **SHORT).text is not None
    rows = steps[0][1]
    assert steps == [
        (rows if strategy == "evs" else rows // 2, rows),
        *[(rows // 2, rows)] * (len(steps) - 1),
    ]
    assert len(steps) > 2


def test_forgotten_frames_are_as_if_never_shown():
    """Without time in the prompt the rest is a shorter video."""
    frames = frames_of(5)
    with fed(
        session_of("llava_onevision", max_tokens=3 * 4, memory_options={"recent": 2}), frames
    ) as session:
        assert [s.seconds for s in session.memory.view()][:1] == [(0.0,)]
        used = [int(2 * t) for t in session.ask(Q, **SHORT).frames_used]
        assert len(used) == 3 and used[-2:] == [3, 4] and session.stats["forgotten"] == 2
        assert torch.equal(logits_of(session), plain("llava_onevision", frames[used])[1])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_forgotten_frames_leave_their_time_in_multimodal_rope(name):
    """The oracle: the whole video's embeddings and positions, without the columns of the frames that were
    forgotten.
    """
    frames, model = frames_of(8), model_of(name)
    inputs = plain_inputs(name, frames, Q)
    with fed(
        session_of(name, max_tokens=2 * 6, memory_options={"recent": 1}, max_bytes=10**6), frames
    ) as session:
        steps = session.memory.view()
        assert [s.seconds[0] for s in steps] == [0.0, 3.0] and session.memory.forgotten == 2
        got = logits_of(session)[0]
    ids = inputs["input_ids"]
    base = model.model
    names = ("mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
    rope, _ = base.get_rope_index(ids, **{k: inputs[k] for k in names if k in inputs})
    with torch.no_grad():
        embeds = base.get_input_embeddings()(ids)
        features = torch.cat(
            base.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
        )
        visual = (ids[0] == model.config.video_token_id).nonzero()[:, 0]
        embeds[0, visual] = features
        keep = torch.ones(ids.shape[1], dtype=torch.bool)
        keep[visual.view(4, -1)[1:3]] = False
        hidden = base.language_model(
            inputs_embeds=embeds[:, keep], position_ids=rope[..., keep]
        ).last_hidden_state
        assert torch.allclose(got, model.lm_head(hidden[:, -1]), atol=1e-4)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_an_answer_has_seen_nothing_later(name):
    frames, other = frames_of(6), frames_of(6, seed=1)
    changed = np.concatenate([frames[:4], other[4:]])
    seen = [logits_of(fed(session_of(name), f), t=1.5) for f in (frames, changed)]
    assert torch.equal(*seen) and torch.equal(seen[0], plain(name, frames[:4])[1])
    late = [logits_of(fed(session_of(name), f)) for f in (frames, changed)]
    assert not torch.equal(*late)
    answer = fed(session_of(name), frames).ask(Q, t=1.5, **SHORT)
    assert max(answer.frames_used) <= 1.5 == answer.time


def test_asking_changes_nothing():
    for name in ("llava_onevision", "qwen2_5_vl"):
        asked, silent = session_of(name), session_of(name)
        for i, frame in enumerate(frames_of(6)):
            asked.push(frame, i / 2)
            asked.ask(Q, max_new_tokens=1)
            silent.push(frame, i / 2)
        assert torch.equal(logits_of(asked), logits_of(silent))


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_state_of_two_streams_does_not_mix(name):
    """Reuse in the tower and the pruner's history belong to a session, also where a question looks at half a
    step.
    """
    options = dict(strategy="stc", budget=0.5, interval=3)
    videos = [frames_of(7), frames_of(7, seed=1)]
    alone = []
    for frames in videos:
        with fed(session_of(name, **options), frames) as session:
            alone.append(logits_of(session))
            assert 0 < session.state.flops < session.state.flops_dense
    with session_of(name, **options) as a, session_of(name, **options) as b:
        for i in range(7):
            a.push(videos[0][i], i / 2)
            a.ask(Q, max_new_tokens=1)
            b.push(videos[1][i], i / 2)
        assert torch.equal(logits_of(a), alone[0]) and torch.equal(logits_of(b), alone[1])
    with fed(session_of(name, "stc_cacher", interval=1), videos[0]) as session:
        assert torch.equal(logits_of(session), plain(name, videos[0])[1])


def test_frames_arrive_while_an_answer_is_given():
    """The answer waits for the reader, who must therefore not wait for the answer."""
    session, frames = fed(session_of("llava_onevision"), frames_of(3)), frames_of(8)
    want = session.ask(Q, **SHORT)
    answering, pushed = threading.Event(), threading.Event()

    class Waits(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            answering.set()
            assert pushed.wait(60)
            return torch.zeros(1, dtype=torch.bool)

    def read() -> None:
        assert answering.wait(60)
        for i in range(3, 8):
            session.push(frames[i], i / 2)
        pushed.set()

    reader = threading.Thread(target=read)
    reader.start()
    got = session.ask(Q, stopping_criteria=StoppingCriteriaList([Waits()]), **SHORT)
    reader.join()
    assert (got.text, got.frames_used) == (want.text, want.frames_used)
    assert session.stats["frames"] == 8 and len(session.ask(Q, **SHORT).frames_used) == 8


def test_many_threads_ask_and_push():
    model, texts = model_of("qwen2_5_vl"), {}
    sessions = [session_of("qwen2_5_vl") for _ in range(3)]
    wants = [plain("qwen2_5_vl", frames_of(4, seed=i))[0] for i in range(3)]

    def work(i: int) -> None:
        fed(sessions[i], frames_of(4, seed=i))
        texts[i] = [sessions[i].ask(Q, **SHORT).text for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert [texts[i] for i in range(3)] == [[w] * 3 for w in wants] and len(set(wants)) > 1
    assert vtoken.patching.patch_of(model) is None


def test_answer_streams_in_pieces():
    session = fed(session_of("llava_onevision"), frames_of(3))
    want = session.ask(Q, **SHORT)
    stream = session.stream_answer(Q, **SHORT)
    session.push(frames_of(1, seed=5)[0], 9.0)  # does not belong to the question
    pieces = list(stream)
    assert len(pieces) > 1 and "".join(pieces).strip() == want.text
    assert stream.answer.frames_used == want.frames_used
    assert 0 < stream.answer.first_token_seconds <= stream.answer.seconds


def test_an_answer_can_be_stopped_and_fails_aloud():
    session = fed(session_of("llava_onevision"), frames_of(3))
    stream = session.stream_answer(Q, max_new_tokens=2000)
    next(stream)
    stream.close()
    assert stream.answer.new_tokens < 2000
    with pytest.raises(ValueError, match="nonsense"):
        list(session.stream_answer(Q, nonsense=1))


def test_reset_starts_another_stream():
    session = fed(session_of("qwen2_5_vl", fps=None), frames_of(5, (56, 56)))
    session.reset()
    assert session.stats["frames"] == session.stats["bytes"] == 0
    assert torch.equal(logits_of(fed(session, frames_of(4))), plain("qwen2_5_vl", frames_of(4))[1])


def test_pictures_of_all_kinds():
    a, b = session_of("llava_onevision"), session_of("llava_onevision")
    frames = frames_of(4)

    class Frame:
        image, seconds, index = frames[3], 7.0, 3

    fed(a, frames[:3])
    a.push(frames[3], 7.0)
    b.push(Image.fromarray(frames[0]))
    b.push(torch.from_numpy(frames[1]))
    b.push(frames[2])
    b.push(Frame())
    assert [s.seconds for s in b.memory.view()] == [(0.0,), (0.5,), (1.0,), (7.0,)]
    assert torch.equal(logits_of(a), logits_of(b))


def test_frames_that_change_size_are_resized_to_the_first():
    session = session_of("qwen2_5_vl")
    session.push(frames_of(1)[0], 0.0)
    session.push(frames_of(1, (80, 100))[0], 1.0)
    assert session.memory.view()[0].rows == 6


def test_sessions_share_a_strategy_and_take_it_off():
    model = model_of("llava")
    one = session_of("llava", "uniform", 0.5)
    with session_of("llava", "uniform", 0.5):
        assert vtoken.patching.patch_of(model) is not None
    assert vtoken.patching.patch_of(model) is not None
    with pytest.raises(ValueError, match=r"patched with uniform\(budget=0.5\) already"):
        session_of("llava", "uniform", 0.25)
    one.close()
    assert vtoken.patching.patch_of(model) is None
    with vtoken.applied(model, "uniform", 0.5):
        with session_of("llava") as session:
            assert len(session.push(frames_of(1)[0]).kept) == 8
        assert vtoken.patching.patch_of(model) is not None
    with pytest.raises(RuntimeError, match="closed"):
        one.push(frames_of(1)[0])


def refused(match: str, name: str = "llava_onevision", error=ValueError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        session_of(name, **kwargs)
    assert vtoken.patching.patch_of(model_of(name)) is None
    assert str(caught.value).count(". ") == 0


def test_what_cannot_be_served_is_refused():
    refused("reads the question", strategy="cdpruner", name="llava")
    refused("drops inside the LLM", strategy="fastv")
    refused('sink_window acts on the KV cache.*use memory="rekv"', strategy="sink_window")
    refused("Unknown memory 'all'", memory="all")
    refused("budget needs a strategy", budget=0.5)
    refused("recent must be at least 1", memory_options={"recent": 0}, strategy="uniform")
    refused("has no option topk", memory_options={"topk": 0})
    refused("serve qwen2_vl: it needs one-dimensional positions", name="qwen2_vl", memory="rekv")
    refused(
        "topk must be a positive multiple of chunk", memory="rekv", memory_options={"topk": 3, "chunk": 2}
    )
    with pytest.raises(ValueError, match="needs the model's processor"):
        vtoken.StreamSession(model_of("llava"), processor_of("llava").tokenizer)
    bare = processor_of("llava_onevision").__class__.__new__(processor_of("llava_onevision").__class__)
    bare.__dict__.update(processor_of("llava_onevision").__dict__, chat_template=None)
    with pytest.raises(ValueError, match="no chat template"):
        vtoken.StreamSession(model_of("llava_onevision"), bare)
    own = vtoken.StreamSession(
        model_of("llava_onevision"), bare, prompt="user : {frames} {question} assistant :"
    )
    assert torch.equal(logits_of(fed(own, frames_of(2))), plain("llava_onevision", frames_of(2))[1])


@pytest.mark.parametrize("strategy", ["farcover", "fastv"])
def test_a_strategy_that_serves_no_stream_is_refused_on_a_patched_model_too(strategy):
    with vtoken.applied(model_of("qwen2_5_vl"), strategy, 0.5):
        for given in ((), (strategy, 0.5)):
            with pytest.raises(
                ValueError, match=r"such as farcover with relevance=0\.0|drops inside the LLM"
            ):
                session_of("qwen2_5_vl", *given)


def test_bad_frames_and_questions_get_a_sentence():
    session = session_of("llava_onevision", max_tokens=6)
    with pytest.raises(ValueError, match="push one first"):
        session.ask(Q)
    frame = frames_of(1)[0]
    session.push(frame, 1.0)
    for t, match in (
        (1.0, "order of their times"),
        (0.5, "order of their times"),
        (float("nan"), "finite number"),
    ):
        with pytest.raises(ValueError, match=match):
            session.push(frame, t)
    for bad in (frame[..., 0], frame.astype(np.float32), "clip.mp4"):
        with pytest.raises(TypeError, match="uint8 RGB"):
            session.push(bad, 2.0)
    with pytest.raises(ValueError, match=r"no frame up to 0.5 s"):
        session.ask(Q, t=0.5)
    with pytest.raises(ValueError, match="must not contain <video>"):
        session.ask("what is in this <video> ?")
    with pytest.raises(ValueError, match="question is empty"):
        session.ask(" ")
    with pytest.raises(ValueError, match="does not fit a memory of 3 tokens"):
        session_of("llava_onevision", max_tokens=3).push(frame, 0.0)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_the_newest_frames_alone_are_the_model_asked_about_them(name):
    """With `frames=4`, the prompt is that of the last four frames, and nothing of earlier ones is left."""
    frames = frames_of(10)
    with fed(session_of(name, frames=4), frames) as session, fed(session_of(name), frames[6:]) as short:
        assert session.ask(Q, **SHORT).frames_used == (3.0, 3.5, 4.0, 4.5)
        assert torch.allclose(logits_of(session), logits_of(short), atol=1e-5)
        assert session.stats["frames"] == 10 and session.stats["bytes"] == short.stats["bytes"]
    with fed(session_of(name, "uniform", 0.5, frames=4), frames) as session:
        assert len(session.ask(Q, **SHORT).frames_used) == 4


def test_a_number_of_frames_that_no_memory_keeps():
    for options, words in (
        (dict(frames=3), "multiple of 2"),
        (dict(frames=0), "multiple of 2"),
        (dict(frames=4, memory_options={"sinks": 1}), "no choice of sinks"),
        (dict(frames=4, memory="rekv"), "memory='rekv' does not do"),
    ):
        with pytest.raises(ValueError, match=words):
            session_of("qwen2_5_vl", **options)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_frames_that_stand_still_are_computed_once(name):
    """The reference of a session's tower goes on from push to push."""
    frames = frames_of(2)[[0, 0, 0, 0, 1, 1, 1, 1]]
    with fed(session_of(name, "still_patches"), frames) as session:
        answer, state = logits_of(session), session.state
        # Qwen reads them in pairs
        assert 2 * state.tokens == state.recomputed * state.frames and 0 < state.flops < state.flops_dense
    assert torch.equal(answer, plain(name, frames)[1])
