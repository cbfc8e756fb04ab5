"""`torch.compile(model)` and `model.compile()`, before and after the patch."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.models import FAMILIES
from tests.oracle import clone

from .common import assert_close


def outer(model):
    return torch.compile(model, backend="eager")


def itself(model):
    model.compile(backend="eager")
    return model


WAYS = {"torch.compile": outer, "model.compile": itself}
BY_DEFAULT = [("llava", "divprune", "model.compile", "compile, patch")]  # a row takes half a minute
MODELS = [("llava", "divprune"), ("qwen2_5_vl", "divprune"), ("llava", "fastv")]
ROWS = [
    (*model, way, order) for model in MODELS for way in WAYS for order in ("compile, patch", "patch, compile")
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy", "way", "order"),
    [pytest.param(*row, marks=() if row in BY_DEFAULT else pytest.mark.product) for row in ROWS],
)
@torch.no_grad()
def test_a_compiled_model(name, strategy, way, order):
    """The answer of the patched model that is not compiled; disabled and unpatched, the dense one."""
    torch.compiler.reset()
    inputs, model = FAMILIES[name].batch("ragged"), FAMILIES[name].build()
    dense = model(**clone(inputs)).logits
    want = vtoken.patch(FAMILIES[name].build(), strategy, budget=0.4)(**clone(inputs)).logits
    if order.startswith("patch"):
        compiled = WAYS[way](vtoken.patch(model, strategy, budget=0.4))
    else:
        compiled = WAYS[way](model)
        assert vtoken.patch(compiled, strategy, budget=0.4) is compiled
    assert_close(compiled(**clone(inputs)).logits, want)
    assert vtoken.report(compiled).tokens_in == int(FAMILIES[name].visual(inputs).sum())
    with vtoken.disabled(compiled):
        assert_close(compiled(**clone(inputs)).logits, dense)
    keys = list(compiled.state_dict())
    vtoken.unpatch(compiled)
    assert list(compiled.state_dict()) == keys
    assert_close(compiled(**clone(inputs)).logits, dense)
