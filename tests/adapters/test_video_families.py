"""EXAONE 4.5, and videos that Perception LM encodes as images: strategy inputs and answers."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_same, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from tests.models.qwen import IMAGES, VIDEOS
from vtoken.strategies import create

from .families import (
    STRATEGIES,
    Probe,
    assert_near,
    check,
    check_full_budget,
    expected_mixed,
    loudest,
    mixed,
    quiet,
    seen,
)
from .pictures import painted
from .test_qwen_families import processed, received_by_hand

pytestmark = pytest.mark.skipif("exaone4_5" not in FAMILIES, reason="not in this transformers")
BOTH = [n for n in ("exaone4_5", "exaone4_5/video", "perception_lm", "perception_lm/video") if n in FAMILIES]
NAMES = [n for n in BOTH if "/" not in n]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [n for n in BOTH if n.startswith("exaone")])
def test_strategies(name, strategy):
    check(name, strategy, FAMILIES[name].prompt([[0], [1, 2], []]), **STRATEGIES[strategy])


@pytest.mark.parametrize("name", BOTH)
def test_full_budget_is_the_unpatched_model(name):
    check_full_budget(name)


@pytest.mark.parametrize("name", NAMES)
def test_image_and_video_in_one_prompt(name):
    inputs, model = mixed(name, [["i0", "v1"], ["v0", "i1", "i2"], []]), subject(name)
    with patched(model, create("pool", budget=0.3)) as spy:
        out = run(model, inputs)
        visuals = vtoken.report(model).visuals
    assert sorted((v.row, v.modality) for v in visuals) == [
        (0, "image"), (0, "video"), (1, "image"), (1, "image"), (1, "video")
    ]  # fmt: skip
    assert_same(out, inputs, expected_mixed(name, inputs, spy.items, visuals))


def test_segments():
    items = seen(subject("exaone4_5"), mixed("exaone4_5", [["v1", "i0"], ["v2"]]), received=False, keys=False)
    image, *videos = items
    assert [(s.kind, s.grid) for s in image.segments] == [("image", (3, 6))]
    for item, (t, h, w) in zip(videos, VIDEOS[1:], strict=True):
        assert [(s.kind, s.grid) for s in item.segments] == [("frame", (h // 2, w // 2))] * t


@pytest.mark.skipif("perception_lm" not in FAMILIES, reason="timm is missing")
def test_frames_of_perception_lm():
    rows = FAMILIES["perception_lm/video"].prompt([[0], [1]])
    for item in seen(subject("perception_lm"), rows, received=False, keys=False):
        assert item.modality == "video"
        assert [(s.kind, s.grid) for s in item.segments] == [("frame", (2, 2))] * 4
    values = torch.full((1, 4, 3, 28, 28), -0.3)
    plain = FAMILIES["perception_lm/video"].prompt([[0]]) | dict(pixel_values_videos=values)
    marked = values.clone()
    marked[0, 2, :, 14:, :14] = 3
    marked = plain | dict(pixel_values_videos=marked)
    model = quiet("perception_lm")
    (before,), (after,) = (seen(model, p, received=False, keys=False) for p in (plain, marked))
    found = loudest(before, after)
    assert found // 4 == 2  # the frame; its cells see each other in a small random tower
    with vtoken.applied(model, Probe(budget=0.5, received=False, keys=False, mark=(found,))):
        run(model, marked, 1)
        visual = vtoken.report(model).visuals[0]
    assert visual.cells[visual.keep].tolist() == [found]


@pytest.mark.parametrize("cell", [(0, 0), (0, 9), (2, 3), (5, 1), (5, 9)])
def test_a_marked_patch_is_found_at_its_cell(cell):
    """A white square in a picture of 6 x 10 cells, through the family's own image processor."""
    (row, column), model = cell, quiet("exaone4_5")
    box = (column * 14, row * 14, column * 14 + 14, row * 14 + 14)
    prompts = [processed(painted((140, 84), b)) for b in (None, box)]
    for prompt in prompts:
        del prompt["mm_token_type_ids"]
    (before,), (after,) = (seen(model, p, received=False, keys=False) for p in prompts)
    assert after.segments[0].grid == (6, 10) and divmod(loudest(before, after), 10) == cell


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_received_attention_is_that_of_the_eager_maps(layer):
    """Layer 2 looks through windows; two heads share a key."""
    inputs = mixed("exaone4_5", [["i0"], ["i1", "i2"]])
    items = seen(subject("exaone4_5"), inputs, layer=layer)
    for item, want in zip(items, received_by_hand("exaone4_5", inputs, layer, IMAGES), strict=True):
        assert_near(item.received_attention(layer), want)


def test_layers_without_positions_are_refused_inside():
    with pytest.raises(ValueError, match="has layers without positions: use a projector strategy"):
        vtoken.patch(subject("exaone4_5"), "fastv")
