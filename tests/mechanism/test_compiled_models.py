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


@pytest.mark.slow
@pytest.mark.parametrize("order", ["compile, patch", "patch, compile"])
@pytest.mark.parametrize("compiling", [outer, itself], ids=["torch.compile", "model.compile"])
@pytest.mark.parametrize(
    ("name", "strategy"), [("llava", "divprune"), ("qwen2_5_vl", "divprune"), ("llava", "fastv")]
)
@torch.no_grad()
def test_a_compiled_model(name, strategy, compiling, order):
    """The answer of the patched model that is not compiled; disabled and unpatched, the dense one."""
    torch.compiler.reset()
    inputs, model = FAMILIES[name].batch("ragged"), FAMILIES[name].build()
    dense = model(**clone(inputs)).logits
    want = vtoken.patch(FAMILIES[name].build(), strategy, budget=0.4)(**clone(inputs)).logits
    if order.startswith("patch"):
        compiled = compiling(vtoken.patch(model, strategy, budget=0.4))
    else:
        compiled = compiling(model)
        assert vtoken.patch(compiled, strategy, budget=0.4) is compiled
    assert_close(compiled(**clone(inputs)).logits, want)
    assert vtoken.report(compiled).tokens_in == int(FAMILIES[name].visual(inputs).sum())
    with vtoken.disabled(compiled):
        assert_close(compiled(**clone(inputs)).logits, dense)
    keys = list(compiled.state_dict())
    vtoken.unpatch(compiled)
    assert list(compiled.state_dict()) == keys
    assert_close(compiled(**clone(inputs)).logits, dense)
