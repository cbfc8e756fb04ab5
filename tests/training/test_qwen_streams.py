"""The third stage of the tiny Qwen2.5-VL: what its windows show, what is asked about them, and what it has
learnt.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from training.tiny.qwen_language import SLOTS
from training.tiny.qwen_streams import LATEST, choose_about_window, make_window, stream_batch, train_streams
from training.tiny.recipes import qwen2_5_vl as recipe
from vtoken import tiny
from vtoken.tiny.clips import Stream, questions
from vtoken.tiny.questions import answers
from vtoken.tiny.scenes import Question

COUNT = "how many digits were shown?"


def told(some: list[Question]) -> dict[str, str]:
    """Answers by question, without the questions after what was not shown, which are drawn."""
    return {q.text: q.answer for q in some if q.answer != "no"}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("frames", "fps"), [(2, 1.0), (8, 2.0), (10, 2.0)])
def test_a_window_is_a_part_of_its_stream_and_has_its_answers(split, frames, fps):
    for seed in range(8):
        window, live = make_window(seed, split, frames, fps), Stream(seed, split, fps)
        here = [np.asarray(frame) for frame in window.media]
        first = [i for i in range(0, 2 * LATEST, 2) if (np.asarray(live.frame(i).image) == here[0]).all()]
        assert len(first) == 1 and window.seconds == tuple(i / fps for i in range(frames))
        later = [np.asarray(live.frame(first[0] + i).image) for i in range(frames)]
        assert all((a == b).all() for a, b in zip(here, later, strict=True))
        right = live.questions_at((first[0] + frames - 1) / fps, since=first[0] / fps)
        assert told(questions(window)) == told(right)
        for i in range(frames):
            assert {o.shape for o in window.scene(i).objects} == {
                name
                for m in live.moments(first[0] + i)
                if first[0] + i < m.stop
                for name in (m.digit, m.shape)
                if name
            }


def test_windows_ask_for_few_digits_and_for_what_is_not_there():
    counts: Counter[str] = Counter()
    for seed in range(150):
        window = make_window(seed)
        asked = choose_about_window(window, np.random.default_rng(seed))
        assert len(asked) <= SLOTS and sum(q.kind == "now" for q in asked) >= 2
        counts.update(q.answer for q in asked if q.kind == "digits")
        shown = {name for m in window.moments for name in (m.digit, m.shape) if name}
        missing = [q.text[:-1].split()[-1] for q in asked[-2:]]
        assert all(q.answer == "no" for q in asked[-2:]) and not shown & {*missing}
        assert missing[0].isdecimal() and not missing[1].isdecimal()
    assert counts["one"] > counts["zero"] > counts["two"] > 0


def test_a_step_has_scenes_clips_and_windows():
    _, processor = recipe.build(width=32, tower_width=32, tower_layers=3, llm_layers=2)
    some = [stream_batch(processor, {"batch": 8}, 0, step) for step in range(2)]
    for parts in some:
        assert {part[0]: len(part[1]) for part in parts} == {"image": 2, "video": 2, "stream": 4}
    assert not any(a[1].equal(b[1]) for a, b in zip(*some) if a[1].shape == b[1].shape)


def test_a_few_steps_reduce_the_loss_and_leave_tower_and_merger():
    torch.manual_seed(0)
    model, processor = recipe.build(width=32, tower_width=32, tower_layers=3, llm_layers=4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    log: list[dict] = []
    train_streams(model, processor, {**recipe.STREAMS, "rate": 2e-3, "batch": 4}, log, 0, steps=41, checks=1)
    losses = [entry["loss"] for entry in log if entry["stage"] == "streams"]
    assert losses[-1] < 0.9 * losses[0] and "held_out_stream_answers" in log[-1]
    same = {name for name, p in model.named_parameters() if p.equal(before[name])}
    assert same == {name for name in before if ".visual." in name}
    assert all(p.requires_grad for p in model.parameters())


def test_the_shipped_model_counts_no_digit_one_and_two():
    windows = [make_window(8_000_000 + i, "test") for i in range(120)]
    pairs = [(w, q) for w in windows for q in questions(w) if q.text == COUNT]
    said = answers(*tiny.load("qwen2_5_vl"), pairs)
    for answer, least in (("zero", 0.9), ("one", 0.9), ("two", 0.8)):
        right = [text == answer for text, (_, question) in zip(said, pairs) if question.answer == answer]
        assert len(right) >= 5 and np.mean(right) >= least, answer
