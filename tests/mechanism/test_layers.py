"""Dropping and merging inside the language model, alone and after pruning in front of it."""

from __future__ import annotations

import pytest
import torch

from tests.models import FAMILIES

from .common import PATCHABLE, assert_moved, assert_same, expected, run, subject
from .fixed import patched

PLANS = {
    "layer 1": dict(layers=(1,), projector=False),
    "layers 1 and 3": dict(layers=(1, 3), projector=False, budget=0.6),
    "before and layer 2": dict(layers=(2,), budget=0.6),
    "merging at layer 2": dict(layers=(2,), projector=False, merge=True),
    "merging before and at layer 1": dict(layers=(1,), merge=True, budget=0.6),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", PATCHABLE)
def test_greedy(name, plan):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    with patched(model, **PLANS[plan]) as spy:
        out = run(model, inputs)
    assert bool(spy.items) == PLANS[plan].get("projector", True)
    assert sorted(spy.drops) == list(PLANS[plan]["layers"])
    assert_same(out, inputs, expected(name, inputs, spy))
    assert_moved(out, name, inputs)
    lengths = {
        k: int(v.sum())
        for k, v in spy.inside(FAMILIES[name], inputs, torch.ones_like(inputs["input_ids"]) > 0)[0].items()
    }
    assert all(v < inputs["input_ids"].numel() for v in lengths.values())


@pytest.mark.parametrize("kind", ["one", "text_only_row"])
@pytest.mark.parametrize("name", PATCHABLE)
def test_other_batches(name, kind):
    model, inputs = subject(name), FAMILIES[name].batch(kind)
    with patched(model, layers=(2,), projector=False) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected(name, inputs, spy))
    assert_moved(out, name, inputs)
