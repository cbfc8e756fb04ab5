from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from training.tiny.models import build_tokenizer
from training.tiny.recipes import qwen2_5_vl, qwen2_5_vl_long
from vtoken import tiny
from vtoken.tiny import clips, long_clips
from vtoken.tiny.assets import SHAPES
from vtoken.tiny.digits import DIGITS
from vtoken.tiny.long_clips import KINDS, SECONDS, THIRDS, held_out, make_long, questions
from vtoken.tiny.questions import answers, score
from vtoken.tiny.scenes import COLOURS


def digest(clip):
    return hashlib.sha256(b"".join(image.tobytes() for image in clip.media)).hexdigest()[:16]


def test_long_clips_are_a_function_of_seed_split_and_length():
    assert make_long(5).moments == make_long(5).moments and questions(make_long(5)) == questions(make_long(5))
    made = {digest(make_long(i, s, n)) for i in range(4) for s in ("train", "test") for n in (32, 64)}
    assert len(made) == 16


def test_long_clips_are_the_same_bytes_on_every_machine():
    assert digest(make_long(0)) == "92cfaa0168898f09"
    assert digest(make_long(0, "test", 64)) == "ac41be988ec14412"


def test_bad_requests_get_one_sentence():
    for wrong, words in (
        ({"split": "valid"}, "train or test"),
        ({"seed": -1}, "0 or more"),
        ({"frames": 16}, "multiple of 32"),
        ({"frames": 48}, "multiple of 32"),
    ):
        with pytest.raises(ValueError, match=words):
            make_long(**{"seed": 0, **wrong})
    with pytest.raises(ValueError, match="n >= 0"):
        held_out(-1)


def gaps(clip):
    """Whole seconds without anything new between the moments of an event."""
    begun = [int(clip.seconds[m.start]) for m in clip.moments]
    ended = [int(clip.seconds[m.stop - 1]) + 1 for m in clip.moments]
    return [later - end for later, end in zip(begun[1:], ended)]


@pytest.mark.parametrize("frames", [32, 64])
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_event_is_short_and_within_a_third(split, frames):
    for seed in range(25):
        clip = make_long(seed, split, frames)
        assert len(clip.media) == frames and clip.seconds[-1] == SECONDS - SECONDS / frames
        first, stop = clip.seconds[clip.moments[0].start], clip.seconds[clip.moments[-1].stop - 1]
        assert THIRDS[clip.third][0] <= first < stop < THIRDS[clip.third][1] and stop - first < 4
        assert len(clip.moments) == 2 and all(m.stop - m.start in (2, 4) for m in clip.moments)
        assert all((m.start * SECONDS) % frames == 0 for m in clip.moments)
        assert sum(gaps(clip)) == (split == "test")
        names = [name for m in clip.moments for name in (m.digit, m.shape, m.colour) if name]
        names += [clip.lasting.shape, clip.lasting.colour] if clip.lasting else []
        assert len(set(names)) == len(names)
        always = [clip.lasting.box] if clip.lasting else []
        for m in clip.moments:
            for left, top, right, bottom in always:
                assert all(
                    o.box[2] <= left or o.box[0] >= right or o.box[3] <= top or o.box[1] >= bottom
                    for o in m.objects
                )


def test_lasting_shapes_are_in_every_frame_and_events_in_none_but_theirs():
    for seed in range(40):
        clip = make_long(seed, "test")
        if not clip.lasting:
            continue
        frames = np.stack([np.asarray(frame).astype(int) for frame in clip.media])
        left, top, right, bottom = clip.lasting.box
        inside = clip.lasting.mask[top - clip.lasting.origin[1] :, left - clip.lasting.origin[0] :] == 255
        inside = inside[: bottom - top, : right - left]
        near = abs(frames[:, top:bottom, left:right] - COLOURS[clip.lasting.colour]).max(-1) <= 2
        assert near[:, inside].all()
        for m in clip.moments:
            left, top, right, bottom = m.objects[0].box
            drawn = abs(np.diff(frames[:, top:bottom, left:right], axis=0)).max((1, 2, 3))
            assert drawn[m.start - 1] > 60


def right_answers(clip, text):
    """All answers that the moments of a clip support, read from the words of the question alone."""
    words = text.rstrip("?").split()
    digits, shapes = ([m for m in clip.moments if m.digit], [m for m in clip.moments if m.shape])
    if words[-1] == "time":
        return {getattr(clip.lasting, "shape" if "shape" in words else "colour")}
    named = {w for w in words if w in DIGITS or w in SHAPES or w in COLOURS}
    meant = [m for m in clip.moments if named <= {m.digit, m.shape, m.colour}]
    if words[0] == "when":
        middles = {(clip.seconds[m.start] + clip.seconds[m.stop - 1]) / 2 for m in meant}
        return {tuple(THIRDS)[int(3 * middle / SECONDS)] for middle in middles}
    wanted = next(w for w in ("digit", "shape", "colour") if w in words[:2])
    if words[-1] in ("first", "last"):
        some = digits if wanted == "digit" else shapes
        return {getattr(some[0 if words[-1] == "first" else -1], wanted)}
    if "after" in words:
        return {next(m for m in digits if m.start > meant[0].start).digit}
    return {getattr(m, wanted) for m in meant}


def test_every_question_has_exactly_its_answer():
    forms, words = np.random.default_rng(0), set(long_clips.vocabulary())
    for i in range(40):
        clip = make_long(i, "test" if i % 2 else "train", 32)
        asked = questions(clip, forms if i % 3 else None)
        assert {q.kind for q in asked} == set(KINDS)
        for q in asked:
            assert right_answers(clip, q.text) == {q.answer}, q
            assert set(q.text.replace("?", " ?").split()) | {q.answer} <= words


def test_held_out_questions_are_balanced_and_of_both_lengths():
    pairs = held_out(18)
    kinds = [q.kind for _, q in pairs]
    assert all(kinds.count(kind) == 6 for kind in KINDS)
    assert [len(clip.media) for clip, _ in pairs] == [32, 32, 32, 64, 64, 64] * 3
    assert all(clip.split == "test" for clip, _ in pairs)
    assert [q for _, q in held_out(18)] == [q for _, q in pairs] != [q for _, q in held_out(18, seed=1)]


def test_tokenizer_has_the_ids_of_the_tiny_qwen_for_the_words_it_knows():
    known = build_tokenizer(qwen2_5_vl.MARKS, clips.vocabulary()).get_vocab()
    more = tiny.load("qwen2_5_vl_long")[1].tokenizer.get_vocab()
    assert known.items() <= more.items()
    assert more.keys() - known.keys() == {"begin", "middle", "end", "all", "time"}


def test_targets_say_where_the_event_and_the_lasting_shape_are():
    clip = next(c for c in (make_long(i, "test", 64) for i in range(20)) if c.lasting)
    third, shows, digit, _, colour = qwen2_5_vl_long.targets(clip).reshape(5, 32, 36)
    assert (np.diff(third[:, 0]) >= 0).all() and {*third[:, 0]} == {0, 1, 2}
    event = {m.start // 2 for m in clip.moments} | {m.stop // 2 - 1 for m in clip.moments}
    assert {*np.nonzero((shows == 1).any(1))[0]} == event
    assert (shows[(digit >= 0) | (colour >= 0)] == 1).all()
    assert (shows == 2).any(1).all() and {*np.unique(shows)} == {0, 1, 2}


@pytest.mark.product  # another recipe of the kind runs by default
def test_a_few_steps_reduce_the_loss(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(qwen2_5_vl_long.LANGUAGE, "batch", 2)
    model, processor = qwen2_5_vl_long.build(width=32, heads=1, tower_width=32, tower_layers=3, llm_layers=3)
    start, log = model.model.visual.blocks[0].attn.qkv.weight.clone(), []
    qwen2_5_vl_long.train(model, processor, log, steps=21, checks=1)
    assert log[-1]["loss"] < 0.95 * log[0]["loss"]
    assert not any(module._forward_hooks for module in model.modules())
    assert model.model.visual.blocks[0].attn.qkv.weight.equal(start)


def test_shipped_model_answers_held_out_questions():
    model, processor = tiny.load("qwen2_5_vl_long")
    pairs = held_out(24, seed=3)
    assert score(pairs, answers(model, processor, pairs, batch_size=6))["all"] >= 0.9
