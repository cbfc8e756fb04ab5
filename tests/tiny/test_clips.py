from __future__ import annotations

import hashlib
from itertools import islice

import numpy as np
import pytest

from vtoken.tiny import clips, digits
from vtoken.tiny.assets import PHOTOGRAPHS, SHAPES
from vtoken.tiny.clip_moments import _assets, bend
from vtoken.tiny.clips import KINDS, held_out, make_clip, questions, stream
from vtoken.tiny.digits import DIGITS
from vtoken.tiny.scenes import COLOURS, NUMBERS


def digest(images):
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:16]


def test_clips_are_a_function_of_seed_split_and_length():
    assert digest(make_clip(5).media) == digest(make_clip(5).media)
    assert make_clip(5).moments == make_clip(5).moments and questions(make_clip(5)) == questions(make_clip(5))
    made = {
        digest(make_clip(i, split, n).media) for i in range(10) for split in ("train", "test") for n in (4, 8)
    }
    assert len(made) == 40


def test_clips_are_the_same_bytes_on_every_machine():
    assert digest(make_clip(0).media) == "49a16e3b67e56204"
    assert digest(make_clip(0, "test").media) == "05248be1ab04c874"


def test_bad_requests_get_one_sentence():
    for wrong, words in (
        ({"split": "valid"}, "train or test"),
        ({"seed": -1}, "0 or more"),
        ({"frames": 7}, "multiple of 2"),
        ({"frames": 2}, "at least 4"),
        ({"fps": 0}, "fps > 0"),
    ):
        with pytest.raises(ValueError, match=words):
            make_clip(**{"seed": 0, **wrong})
    with pytest.raises(ValueError, match="0 or more"):
        stream(0).frame(-1)


def test_splits_share_no_digit_no_font_and_no_photograph():
    assert not set(digits.FONTS["train"]) & set(digits.FONTS["test"])
    with np.load(digits.FILE) as stored:
        masks = {
            split: {m.tobytes() for d in stored[f"digits_{split}"] for m in d} for split in ("train", "test")
        }
    assert {split: len(some) for split, some in masks.items()} == {
        s: 10 * n for s, n in digits.GLYPHS.items()
    }
    assert not masks["train"] & masks["test"]
    for split in ("train", "test"):
        known = {name.partition(".")[0] for name in PHOTOGRAPHS[split]}
        drawn = [make_clip(i, split, 4) for i in range(20)]
        assert {clip.background for clip in drawn} <= known
        shown = [o for clip in drawn for m in clip.moments for o in m.objects if o.shape in DIGITS]
        assert all(o.mask.tobytes() in masks[split] for o in shown)


def right_answers(shows, text):
    """All answers that a clip supports, from what is on screen frame by frame and the words of the question
    alone.

    ``shows``: per frame ``(moment, digit, shape, colour)`` with None for what is not there.
    """
    words = text.rstrip("?").split()
    about = {w for w in words if w in COLOURS or w in SHAPES or w in DIGITS}
    fits = [s for s in shows if about <= set(s[1:])]
    noun = 1 if "digit" in words else 2 if "shape" in words[:2] else 3
    if words[0] == "how":
        return {NUMBERS[len({s[0] for s in shows if s[1]})]}
    if words[0] in ("was", "did"):
        return {"yes" if fits else "no"}
    if words[-1] == "now":
        return {shows[-1][noun] or "none"}
    if words[-1] in ("first", "last"):
        said = [s[noun] for s in shows if s[noun]]
        return {said[0 if words[-1] == "first" else -1]}
    if "after" in words:
        moments = {s[0] for s in fits}
        return {next(s[1] for s in shows if s[0] is not None and s[0] > m and s[1]) for m in moments}
    return {s[noun] for s in fits} - {None}


def frame_by_frame(moments, frames):
    out = []
    for i in range(frames):
        on = [(k, m.digit, m.shape, m.colour) for k, m in enumerate(moments) if m.start <= i < m.stop]
        assert len(on) <= 1
        out += on or [(None, None, None, None)]
    return out


def test_every_question_has_exactly_its_answer():
    forms, words = np.random.default_rng(0), set(clips.vocabulary())
    for i in range(120):
        clip = make_clip(i, "test" if i % 2 else "train", frames=(4, 6, 8, 12, 16)[i % 5])
        shows = frame_by_frame(clip.moments, len(clip.media))
        asked = questions(clip, forms if i % 3 else None)
        assert {q.kind for q in asked} == set(KINDS)
        for question in asked:
            assert right_answers(shows, question.text) == {question.answer}, (clip.moments, question)
            assert set(question.text.replace("?", " ?").split()) <= words and question.answer in words


def test_questions_about_what_was_seen_early_do_not_depend_on_the_rest():
    some = 0
    for i in range(60):
        clip = make_clip(i, frames=12)
        shows = frame_by_frame(clip.moments, 12)
        early = questions(clip, seen_before=3.0)
        some += len(early)
        assert set(early) <= set(questions(clip))
        for question in early:
            assert right_answers(shows[:6], question.text) == right_answers(shows, question.text)
            later = {name for show in shows[6:] for name in show[1:]}
            if question.answer in DIGITS:
                assert question.answer not in later
    assert some > 300


def test_objects_are_where_their_boxes_say_and_gaps_are_nearly_still():
    for i in range(20):
        clip = make_clip(i, frames=8)
        pixels = [np.asarray(frame).astype(int) for frame in clip.media]
        assert clip.seconds == clip.media.seconds == tuple(k / 2 for k in range(8))
        for moment in clip.moments:
            assert moment.start % 2 == moment.stop % 2 == 0 and 0 <= moment.start < moment.stop <= 8
            scene = clip.scene(moment.start)
            assert [o.shape for o in scene.objects] == [name for name in (moment.digit, moment.shape) if name]
            for item in scene.objects:
                left, top, right, bottom = item.box
                assert 3 <= left < right <= 93 and 3 <= top < bottom <= 93
                colour = COLOURS.get(item.colour, (250, 250, 250))
                near = abs(pixels[moment.start][top:bottom, left:right] - colour).max(-1) <= 8
                assert 0.15 < near.mean() <= 1
        assert not clip.scene(0).objects or clip.moments[0].start == 0
        still = [abs(a - b).max() <= 4 for a, b in zip(pixels[::2], pixels[1::2])]
        assert all(still) or not any(still)  # one camera per clip


def test_bent_masks_are_like_their_originals_and_no_two_alike():
    rng = np.random.default_rng(0)
    for mask in _assets()["digits_train"].reshape(-1, 24, 24)[::30]:
        some = [bend(mask, rng) for _ in range(6)]
        assert len({bent.tobytes() for bent in some}) == 6
        for bent in some:
            assert bent.shape == (24, 24) and bent.dtype == np.uint8 and 0.4 < bent.mean() / mask.mean() < 2.2
            both = np.minimum(bent, mask).astype(float).sum() / min(
                bent.astype(float).sum(), mask.astype(float).sum()
            )
            assert both > 0.5


def test_held_out_questions_are_balanced():
    pairs = held_out(40, frames=(8, 12))
    kinds = [question.kind for _, question in pairs]
    assert all(kinds.count(kind) == 8 for kind in KINDS)
    assert all(clip.split == "test" for clip, _ in pairs)
    assert [len(clip.media) for clip, _ in pairs] == ([8] * 5 + [12] * 5) * 4
    assert (
        [q for _, q in held_out(10)] == [q for _, q in held_out(10)] != [q for _, q in held_out(10, seed=1)]
    )


def test_stream_is_endless_deterministic_and_knows_no_future():
    live, again = stream(3), stream(3)
    frames = list(islice(live, 60))
    assert [f.seconds for f in frames[:3]] == [0.0, 0.5, 1.0]
    assert digest([again.frame(50).image, again.frame(7).image]) == digest(
        [frames[50].image, frames[7].image]
    )
    assert digest([stream(4).frame(50).image]) != digest([frames[50].image])
    for frame in frames:
        assert all(m.start <= frame.index for m in frame.moments)
        assert stream(3).questions_at(frame.seconds) == live.questions_at(frame.seconds)
    assert frames[59].moments[: len(frames[40].moments)] == frames[40].moments


def test_stream_questions_have_exactly_their_answer():
    live, kinds = stream(1), set()
    for now in (4, 9, 21, 50, 120, 300):
        shows = frame_by_frame([m for m in live.moments(now) if m.start <= now], now + 1)
        for question in live.questions_at(now / live.fps):
            kinds.add(question.kind)
            assert right_answers(shows, question.text) == {question.answer}, (now, question)
        early = live.questions_at(now / live.fps, seen_before=now / live.fps / 2)
        for question in early:
            assert right_answers(shows[: now // 2 + 1], question.text) == {question.answer}
    assert kinds == set(KINDS) and early
