"""Granite 4 Vision: the cell of every token, and what a strategy does to features of several LLM layers."""

from __future__ import annotations

import functools

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import Fixed, patched
from tests.models import FAMILIES
from tests.models.clip import ANYRES

from .families import check, check_full_budget, seen
from .pictures import find

NAME = "granite4_vision"
pytestmark = pytest.mark.skipif(NAME not in FAMILIES, reason="not in this transformers")


@pytest.mark.parametrize("strategy", ["random", "uniform", "pool", "divprune"])
def test_strategies(strategy):
    check(NAME, strategy, FAMILIES[NAME].prompt([[0], [1, 2], []]))


def test_merged_tokens_are_merged_for_every_layer():
    inputs, model = FAMILIES[NAME].prompt([[0], [1, 2], []]), subject(NAME)
    with patched(model, Fixed(merge=True)) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected(NAME, inputs, spy))
    assert all(answer.into is not None for _, answer in spy.items)
    dense = run(clean(NAME), inputs, 1).logits[0]
    assert (out.logits[0] - dense)[:2].abs().amax(1).min() > 1e-2


def test_full_budget_is_the_unpatched_model():
    check_full_budget(NAME)


def test_features_of_all_layers_side_by_side():
    items = seen(subject(NAME), FAMILIES[NAME].prompt([[0], [1, 2]]), received=False, keys=False)
    assert [tuple(item.features.shape) for item in items] == [(count, 4 * 32) for _, _, count in ANYRES]
    assert [len(item.segments) for item in items] == [tiles for _, tiles, _ in ANYRES]
    assert {s.grid for item in items for s in item.segments} == {(4, 4)}


@functools.cache
def still():
    """A model whose tower and Q-Former mix little: what changes most is the cell that was marked."""
    model = FAMILIES[NAME].build()
    for key, weight in model.base_model.named_parameters():
        if key.endswith(("out_proj.weight", "output.dense.weight")) and "language_model" not in key:
            weight.data *= 0.02
    return model


@pytest.mark.parametrize("segment", [0, 1, 4])
@pytest.mark.parametrize("cell", [(0, 1), (1, 3), (2, 2)])
def test_a_marked_cell_is_found(segment, cell):
    """Two by two patches of 7 pixels in one of the tiles are a cell."""
    inputs = FAMILIES[NAME].prompt([[0]])
    values = torch.full_like(inputs["pixel_values"], -0.3)
    marked = values.clone()
    y, x = cell[0] * 14, cell[1] * 14
    marked[0, segment, :, y : y + 14, x : x + 14] = 3
    sizes = dict(image_sizes=torch.tensor([[112, 112]]))  # a canvas without padding
    prompts = [inputs | dict(pixel_values=v) | sizes for v in (values, marked)]
    ids = [*[100] * (16 + 64 + 8)]
    for prompt in prompts:
        prompt["input_ids"] = torch.tensor([[5, 6, *ids, 7, 8]])
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    found, _ = find(still(), *prompts, segment=segment)
    assert found == segment * 16 + cell[0] * 4 + cell[1]


@pytest.mark.parametrize("strategy", ["fastv", "quecc", "voco"])
def test_what_layers_that_add_features_refuse(strategy):
    assert strategy not in vtoken.list_strategies(model=subject(NAME))
    with pytest.raises(ValueError, match=r"(several layers|goes on to add features|needs .*question).*: use"):
        vtoken.patch(subject(NAME), strategy)
