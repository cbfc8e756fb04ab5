"""Outputs of tower layers as maps: a patch that changes changes its own place of the map, and no other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import vtoken
from tests.models import FAMILIES
from tests.oracle import clone
from vtoken.strategies import Strategy
from vtoken.tokens import Needs

SEEN: list[torch.Tensor] = []


@dataclass
class ReadsStates(Strategy):
    """Keep everything and note the maps; not registered, so that no other test meets it."""

    def needs(self, tower):
        return Needs() if tower is None else Needs(states=(0,))

    def select(self, tokens):
        SEEN.append(tokens.states(0))
        return vtoken.Selection.everything(len(tokens))


ReadsStates.info = vtoken.StrategyInfo("reads_states", "", ("projector",), cls=ReadsStates)
NAMES = ["llava", "llava_onevision/video", "internvl", "qwen2_vl/video", "qwen2_5_vl", "qwen3_vl", "mistral3"]


@pytest.mark.parametrize("name", NAMES)
def test_maps_lie_as_the_patches_do(name):
    """Without attention a layer is a function of each patch alone."""
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch("one")
    vtoken.patch(model, ReadsStates(budget=0.5))
    tower = next(iter(vtoken.patching.patch_of(model).adapter.towers.values()))
    for part in tower.attention(0).modules():  # only the residual stream and the MLP are left
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.weight)
            part.bias is None or nn.init.zeros_(part.bias)

    def maps(given):
        SEEN.clear()
        with torch.no_grad():
            model(**given)
        return SEEN[0]

    before = maps(clone(inputs))
    _, frames, _, columns, _ = before.shape
    assert frames == 1
    key = next(k for k in inputs if k.startswith("pixel_values"))
    places = set()
    for step in range(3):
        changed = clone(inputs)
        if changed[key].ndim == 2:  # Qwen: one row per patch
            changed[key][step * 5] += 1.0
        else:
            size = changed[key].shape[-1] // columns
            changed[key].reshape(-1, *changed[key].shape[-3:])[
                0, :, :size, step * size : (step + 1) * size
            ] += 1.0
        differs = (maps(changed) != before).any(-1)[:, 0]
        assert int(differs.sum()) == 1
        places.add(tuple(differs.nonzero()[0].tolist()))
        if changed[key].ndim != 2:
            assert tuple(differs.nonzero()[0].tolist()) == (0, 0, step)
    assert len(places) == 3
