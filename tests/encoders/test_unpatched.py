"""The oracle itself: without merging it must be the unpatched models."""

from __future__ import annotations

import pytest
import torch

from .models import CASES, DEPTH, images


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_without_merging_is_the_model(name):
    case = CASES[name]
    model = case.build().double()
    x = images().double()
    off = 5e-6 if name.endswith("eager") else 1e-9  # transformers' eager softmax is in float32
    with torch.no_grad():
        results = case.oracle(model, x, [0] * DEPTH)
        torch.testing.assert_close(
            torch.stack([r.x for r in results]), case.leaving(model, x), rtol=0, atol=off
        )
        torch.testing.assert_close(case.expected(model, results), case.call(model, x), rtol=0, atol=off)
        assert case.call(model, x).std() > 0.01
