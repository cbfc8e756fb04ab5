"""Qwen2.5-Omni and Qwen3-Omni thinkers: strategy inputs, audio in the batch and inside videos, answers."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from tests.models.common import END, START, VID, left_pad, pixels, text
from tests.models.omni import AUDIO, AUDIO_END, AUDIO_START
from tests.models.qwen import IMAGES, VIDEOS
from vtoken.strategies import create

from .families import (
    STRATEGIES,
    Probe,
    assert_near,
    check,
    check_attention_rows,
    check_full_budget,
    expected_mixed,
    loudest,
    mixed,
    seen,
)
from .test_qwen_families import processed, received_by_hand

NAMES = [name for name in ("qwen2_5_omni", "qwen3_omni") if name in FAMILIES]
BOTH = [f"{name}{kind}" for name in NAMES for kind in ("", "/video")]
HEARD = {"qwen2_5_omni": 4, "qwen3_omni": 2}  # tokens of 16 columns of a spectrogram


def with_audio(name: str) -> dict[str, torch.Tensor]:
    """A row with a picture and a sound, a row with a sound alone, a row with a video and a sound before it."""
    sound = [AUDIO_START, *[AUDIO] * HEARD[name], AUDIO_END]
    item, clip = FAMILIES[name].item(1, 1), FAMILIES[f"{name}/video"].item(0, 1)
    rows = [
        [*text(3, 1), *item.ids, *text(2, 2), *sound, *text(4, 3)],
        [*text(2, 4), *sound, *text(3, 5)],
        [*text(2, 6), *sound, *text(2, 7), *clip.ids, *text(3, 8)],
    ]
    ids, mask = left_pad(rows)
    heard = dict(
        input_features=pixels(3, 8, 16, seed=50), feature_attention_mask=torch.ones(3, 16, dtype=torch.long)
    )
    return dict(input_ids=ids, attention_mask=mask, **heard, **item.tensors, **clip.tensors)


def sound_in_video(name: str) -> dict[str, torch.Tensor]:
    """A video of three frames whose sound comes between its first and its second frame."""
    clip = FAMILIES[f"{name}/video"].item(0, 1)
    frames = [START, AUDIO_START, *[VID] * 6, *[AUDIO] * HEARD[name], *[VID] * 12, AUDIO_END, END]
    ids, mask = left_pad([[*text(3, 1), *frames, *text(4, 2)]])
    heard = dict(
        input_features=pixels(1, 8, 16, seed=51), feature_attention_mask=torch.ones(1, 16, dtype=torch.long)
    )
    return dict(input_ids=ids, attention_mask=mask, use_audio_in_video=True, **heard, **clip.tensors)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", BOTH)
def test_strategies(name, strategy):
    inputs = FAMILIES[name].prompt([[0], [1, 2], []])
    check(name, strategy, inputs, **STRATEGIES[strategy])


@pytest.mark.parametrize("strategy", ["pool", "hired"])
@pytest.mark.parametrize("name", NAMES)
def test_audio_stays(name, strategy):
    """Audio in rows with pictures, with videos and alone: the answer of what was chosen, and all audio read."""
    model, inputs = subject(name), with_audio(name)
    with patched(model, create(strategy, budget=0.3, **STRATEGIES[strategy])) as spy:
        out = run(model, inputs)
        report = vtoken.report(model)
    assert_same(out, inputs, expected_mixed(name, inputs, spy.items, report.visuals))
    dense = run(clean(name), inputs, 1).logits[0]
    changed = (out.logits[0] - dense).abs().amax(1)
    assert changed[0] > 1e-2 and changed[1] < 1e-4 and changed[2] > 1e-2


@pytest.mark.parametrize("strategy", ["pool", "hired"])
@pytest.mark.parametrize("name", NAMES)
def test_audio_inside_a_video_stays(name, strategy):
    """`use_audio_in_video`: positions are those of the whole prompt, and sound between frames is kept."""
    model, inputs = subject(name), sound_in_video(name)
    with patched(model, create(strategy, budget=0.3, **STRATEGIES[strategy])) as spy:
        out = run(model, inputs)
    (item, _), count = spy.items[0], len(spy.items)
    assert count == 1 and item == 18
    assert_same(out, inputs, expected(f"{name}/video", inputs, spy))
    dense = run(clean(name), inputs, 1).logits[0]
    assert (out.logits[0] - dense).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_image_and_video_in_one_prompt(name):
    inputs, model = mixed(name, [["i0", "v1"], ["v0", "i1", "i2"], []]), subject(name)
    with patched(model, create("pool", budget=0.3)) as spy:
        out = run(model, inputs)
        visuals = vtoken.report(model).visuals
    assert_same(out, inputs, expected_mixed(name, inputs, spy.items, visuals))


@pytest.mark.parametrize("name", BOTH)
def test_full_budget_is_the_unpatched_model(name):
    check_full_budget(name)


@pytest.mark.parametrize("name", NAMES)
def test_segments(name):
    image, *videos = seen(subject(name), mixed(name, [["v1", "i0"], ["v2"]]), received=False, keys=False)
    assert [(s.kind, s.grid) for s in image.segments] == [("image", (3, 6))]
    for item, (t, h, w) in zip(videos, VIDEOS[1:], strict=True):
        assert {(s.kind, s.grid) for s in item.segments} == {("frame", (h // 2, w // 2))}
        step = 1.0 + VIDEOS.index((t, h, w))
        assert [s.seconds for s in item.segments] == [step * i for i in range(t)]


@pytest.mark.parametrize("cell", [(0, 0), (0, 9), (2, 3), (5, 1), (5, 9)])
@pytest.mark.parametrize("name", NAMES)
def test_a_marked_patch_is_found_at_its_cell(name, cell):
    """A white square in a picture of 6 x 10 cells, through the family's own image processor."""
    (row, column), plain = cell, Image.new("RGB", (140, 84), (90, 90, 90))
    marked = plain.copy()
    box = (column * 14, row * 14, column * 14 + 13, row * 14 + 13)
    ImageDraw.Draw(marked).rectangle(box, fill=(255, 255, 255))
    model, prompts = subject(name), [processed(p) for p in (plain, marked)]
    for prompt in prompts:
        del prompt["mm_token_type_ids"]
    (before,), (after,) = (seen(model, p, received=False, keys=False) for p in prompts)
    assert divmod(loudest(before, after), 10) == cell
    with vtoken.applied(model, Probe(budget=0.5, received=False, keys=False, mark=(row * 10 + column,))):
        run(model, prompts[1], 1)
        visual = vtoken.report(model).visuals[0]
    assert visual.cells[visual.keep].tolist() == [row * 10 + column] and visual.tokens_out == 1


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_received_attention_is_that_of_the_eager_maps(name, layer):
    inputs = mixed(name, [["i0"], ["i1", "i2"]])
    items = seen(subject(name), inputs, layer=layer)
    for item, want in zip(items, received_by_hand(name, inputs, layer, IMAGES), strict=True):
        assert_near(item.received_attention(layer), want)


@pytest.mark.parametrize("name", NAMES)
def test_attention_rows_are_those_of_the_eager_model(name):
    check_attention_rows(name)
