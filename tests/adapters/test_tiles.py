"""Idefics3 and SmolVLM: tiles between words that name them are joined to images."""

from __future__ import annotations

import re

import pytest
import torch
from transformers.models.smolvlm import processing_smolvlm

import vtoken
from tests.mechanism.common import clean, subject
from tests.models import FAMILIES
from tests.models.common import IMG, ROW, START, left_pad, text

from .families import (
    GLOBAL,
    LINE,
    assert_near,
    attention,
    block_means,
    check,
    loudest,
    maps_of,
    quiet,
    seen,
    tiled,
    tiled_inputs,
)


@pytest.mark.parametrize("grid", [(0, 0), (1, 2), (2, 3)])
def test_tags_are_those_of_the_processor(grid):
    made = processing_smolvlm.get_image_prompt_string(*grid, 16, "<fake>", "<image>", "<global-img>")
    names = {"<fake>": START, "<image>": IMG, "<global-img>": GLOBAL, "\n": LINE}
    names |= {f"<row_{r + 1}_col_{c + 1}>": ROW + 3 * r + c for r in range(grid[0]) for c in range(grid[1])}
    assert [names[token] for token in re.findall(r"<[^>]*>|\n", made)] == tiled(*grid)


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_tiles_between_tags(name):
    inputs = tiled_inputs([[(2, 3), (0, 0)], [(1, 2)], [(3, 1), (2, 2)]])
    items = seen(subject(name), inputs, received=False, keys=False)
    assert [len(item.segments) for item in items] == [7, 1, 3, 4, 5]
    first = items[0]
    assert [s.kind for s in first.segments] == ["thumbnail"] + ["crop"] * 6
    assert [s.place for s in first.segments[1:]] == [(r, c) for r in range(2) for c in range(3)]
    assert first.segments[6].box == (2 / 3, 1 / 2, 1, 1)
    assert [s.place for s in items[3].segments[1:]] == [(0, 0), (1, 0), (2, 0)]
    assert items[1].segments[0].kind == "image"
    # the whole image comes last and is seen first
    assert first.cells.tolist() == [*range(16, 112), *range(16)]
    for strategy, options in (
        ("hired", dict(score="received")),
        ("vtc_cls", dict(score="received")),
        ("pool", {}),
    ):
        check(name, strategy, inputs, **options)


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_scores_follow_their_tile(name):
    """Scores of the thumbnail and the crops are those of the tiles behind them, in the order of the segments."""
    inputs = tiled_inputs([[(1, 2)]])
    (item,) = seen(subject(name), inputs)
    parts = seen(subject(name), dict(inputs, **_single_tiles(inputs)))
    assert len(parts) == 3
    for segment, tile in enumerate([2, 0, 1]):
        assert_near(item.received_attention(3)[segment], parts[tile].received_attention(3)[0])
        assert_near(item.keys(3)[segment], parts[tile].keys(3)[0])


def _single_tiles(inputs: dict) -> dict:
    ids, mask = left_pad([[*text(3, 1), *[t for _ in range(3) for t in [*tiled(0, 0), 9]], *text(4, 7)]])
    return dict(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
@pytest.mark.parametrize("tile", [0, 3, 5, 6])
def test_a_marked_tile_is_found_at_its_place(name, tile):
    values = torch.full((1, 7, 3, 56, 56), -0.3)
    marked = values.clone()
    marked[0, tile, :, 14:28, 42:56] = 3
    (before,), (after,) = (
        seen(quiet(name), tiled_inputs([[(2, 3)]], v), received=False, keys=False) for v in (values, marked)
    )
    segment, cell = divmod(loudest(before, after), 16)
    assert divmod(cell, 4) == (1, 3)
    assert segment == (0 if tile == 6 else tile + 1)
    if tile < 6:
        assert after.segments[segment].place == divmod(tile, 3)


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_padding_of_a_tile_is_not_looked_at(name):
    """The lower part of one tile and the right part of another are padding."""
    inputs = tiled_inputs([[(0, 0)], [(0, 0)]])
    mask = torch.ones(2, 1, 56, 56, dtype=torch.long)
    mask[0, :, 35:], mask[1, :, :, 21:] = 0, 0
    inputs["pixel_attention_mask"] = mask
    items = seen(subject(name), inputs, layer=3)
    (maps,) = maps_of(name, inputs, attention(name, 3))
    for item, m, real in zip(items, maps, mask[:, 0, ::7, ::7].flatten(1).bool(), strict=True):
        assert (m[:, :, ~real] == 0).all()
        want = block_means(m[:, real].mean((0, 1)), 8, 8, 2)
        assert_near(item.received_attention(3)[0], want)
    check(name, "hired", inputs, score="received")


def test_features_without_their_layout_are_refused():
    """Idefics3 takes ready-made features: what they show is not known, so nothing is dropped silently."""
    inputs = FAMILIES["idefics3"].batch("one")
    model = subject("idefics3")
    with torch.no_grad():
        ready = clean("idefics3").base_model.get_image_features(inputs.pop("pixel_values")).pooler_output
    inputs.pop("pixel_attention_mask")
    with (
        vtoken.applied(model, "random"),
        pytest.raises(RuntimeError, match="without their layout"),
        torch.no_grad(),
    ):
        model(**inputs, image_hidden_states=ready)
