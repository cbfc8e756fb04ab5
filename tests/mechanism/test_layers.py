"""Dropping and merging inside the language model, alone and after pruning before it."""

from __future__ import annotations

import pytest
import torch

from tests.models import FAMILIES
from tests.oracle import CACHE

from .common import ALIGNED, BOTH, INSIDE, SOME, assert_moved, assert_same, expected, run, subject
from .fixed import patched

PLANS = {
    "before and layer 2": BOTH,
    "merging at layers 1 and 3": dict(layers=(1, 3), projector=False, merge=True, budget=0.6),
    "aligned cache": dict(ALIGNED, projector=False),
    "layer 1": dict(layers=(1,), projector=False),
    "layer 0": dict(layers=(0,), projector=False),
    "merging before and at layer 1": dict(layers=(1,), merge=True, budget=0.6),
    "aligned cache behind the projector": ALIGNED,
}
CASES = [
    pytest.param(name, plan, marks=() if plan in list(PLANS)[:2] or name in SOME else pytest.mark.product)
    for plan in list(PLANS)[:3]
    for name in INSIDE
]
CASES += [
    pytest.param(name, plan, marks=() if name in SOME[:2] else pytest.mark.product)
    for plan in list(PLANS)[3:]
    for name in SOME
]


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_greedy(name, plan):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    with patched(model, **PLANS[plan]) as spy:
        out = run(model, inputs)
    assert bool(spy.items) == PLANS[plan].get("projector", True)
    assert sorted(spy.drops) == list(PLANS[plan]["layers"])
    assert_same(out, inputs, expected(name, inputs, spy))
    assert_moved(out, name, inputs)
    keep = (
        spy.in_front(FAMILIES[name], inputs)[0] if spy.items else torch.ones_like(inputs["input_ids"]).bool()
    )
    alive, stored = keep & inputs["attention_mask"].bool(), []
    for i in range(4):
        alive = alive & spy.inside(FAMILIES[name], inputs, keep)[0].get(i, keep)
        stored.append(alive)
    stored = [stored[-1] if i in spy.strategy.aligned else rows for i, rows in enumerate(stored)]
    assert [layer.keys.shape[2] for layer in out[CACHE].layers] == [int(s.sum(1).max()) + 4 for s in stored]


@pytest.mark.parametrize("kind", ["one", "text_only_row"])
@pytest.mark.parametrize("name", SOME)
def test_other_batches(name, kind):
    model, inputs = subject(name), FAMILIES[name].batch(kind)
    with patched(model, layers=(2,), projector=False) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected(name, inputs, spy))
    assert_moved(out, name, inputs)
