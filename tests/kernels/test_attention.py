"""Attention rows and received attention of the torch backend against the float64 oracle."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vtoken import kernels

from . import oracle
from .cases import bounds, heads, masks, tensor

common = settings(max_examples=20, deadline=None, derandomize=True)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@common
@given(heads(rows=5), st.data())
def test_attention_rows(qk, data):
    q, k = qk
    mask = data.draw(masks(q.shape[0], q.shape[2], k.shape[2]))
    want = oracle.attention(q, k, None, mask)
    got = kernels.attention_rows(q, k, mask=mask)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), want, rtol=0, atol=2e-6)
    for reduce in ("sum", "mean"):
        reduced = getattr(want, reduce)((1, 2))
        got = kernels.attention_rows(q, k, mask=mask, reduce=reduce)
        assert got.shape == reduced.shape and torch.allclose(got.double(), reduced, rtol=0, atol=2e-5)


def test_a_row_that_sees_nothing_is_zero_and_scale_is_used():
    q, k = tensor(0, 2, 4, 3, 8), tensor(1, 2, 2, 9, 8)
    mask = torch.ones(2, 3, 9, dtype=torch.bool)
    mask[0, 1] = False
    rows = kernels.attention_rows(q, k, 0.7, mask)
    assert not rows[0, :, 1].any() and torch.allclose(rows[0, :, 0].sum(-1), torch.ones(4))
    assert torch.allclose(rows.double(), oracle.attention(q, k, 0.7, mask), atol=1e-6)


def test_huge_logits_do_not_overflow():
    q, k = 3e3 * tensor(0, 1, 1, 2, 8), 3e3 * tensor(1, 1, 1, 9, 8)
    assert torch.allclose(
        kernels.attention_rows(q, k).double(), oracle.attention(q, k, None, None), atol=1e-5
    )
    q = 3e3 * tensor(2, 1, 1, 9, 8)
    assert torch.allclose(
        kernels.received_attention(q, k).double(), oracle.received(q, k, None, [0, 9]), atol=1e-5
    )


def test_empty_inputs():
    assert kernels.attention_rows(tensor(0, 2, 2, 0, 8), tensor(0, 2, 1, 5, 8)).shape == (2, 2, 0, 5)
    assert torch.equal(
        kernels.attention_rows(tensor(0, 2, 2, 0, 8), tensor(0, 2, 1, 5, 8), reduce="mean"), torch.zeros(2, 5)
    )
    assert kernels.attention_rows(tensor(0, 2, 2, 3, 8), tensor(0, 2, 1, 0, 8), reduce="sum").shape == (2, 0)
    empty = tensor(0, 2, 2, 0, 8)
    assert kernels.received_attention(empty, empty).shape == (2, 0)
    assert kernels.received_attention(empty, empty, cu_seqlens=torch.tensor([0, 0])).shape == (2, 0)


@common
@given(heads(most=60), st.data())
def test_received_attention(qk, data):
    q, k = qk
    n = q.shape[2]
    cuts = data.draw(bounds(n))
    want = oracle.received(q, k, None, cuts)
    for chunk in (1, 7, 256):
        got = kernels.received_attention(q, k, cu_seqlens=torch.tensor(cuts, dtype=torch.int32), chunk=chunk)
        assert got.dtype == torch.float32 and torch.allclose(got.double(), want, rtol=0, atol=2e-6)
    if len(cuts) == 2:
        assert torch.allclose(kernels.received_attention(q, k).double(), want, rtol=0, atol=2e-6)


def test_windows_share_their_mass_and_cost_no_map():
    q, k = tensor(0, 1, 2, 1024, 4), tensor(1, 1, 1, 1024, 4)
    cuts = torch.tensor([0, *range(32, 513, 32), 700, 1024])
    got = kernels.received_attention(q, k, cu_seqlens=cuts)[0]
    sums = torch.stack([got[a:b].sum() for a, b in pairwise(cuts)])
    assert torch.allclose(sums, torch.ones(len(cuts) - 1), atol=1e-5)
    for windows in (cuts, None):
        with Largest() as largest:
            kernels.received_attention(q, k, cu_seqlens=windows, chunk=16)
        assert (
            2 * 16 * 900 < largest.elements <= 2 * 16 * 1024
            if windows is None
            else largest.elements <= 2 * 16 * 1024
        )


def test_many_equal_windows_are_one_batch():
    q = tensor(0, 1, 2, 640, 4)

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    with Calls() as few:
        kernels.received_attention(q, q, cu_seqlens=torch.tensor([0, 320, 640]), chunk=320)
    with Calls() as many:
        kernels.received_attention(q, q, cu_seqlens=torch.arange(0, 641, 16), chunk=320)
    assert many.count == few.count


def test_gradients():
    q, k = (tensor(s, 1, 2, 5, 3).double().requires_grad_() for s in (0, 1))
    mask = torch.tensor([[True, True, False, True, True]])
    assert torch.autograd.gradcheck(
        lambda q, k: kernels.attention_rows(q, k[:, :1], mask=mask, reduce="mean"), (q, k)
    )
    cuts = torch.tensor([0, 2, 5])
    assert torch.autograd.gradcheck(
        lambda q, k: kernels.received_attention(q, k, cu_seqlens=cuts, chunk=2), (q, k)
    )


def test_what_does_not_fit_is_refused():
    q, k = tensor(0, 2, 4, 5, 8), tensor(0, 2, 2, 5, 8)
    for words, call in [
        ("multiple of Hk", lambda: kernels.attention_rows(q[:, :3], k)),
        ("bool mask", lambda: kernels.attention_rows(q, k, mask=torch.ones(2, 5))),
        ("bool mask", lambda: kernels.attention_rows(q, k, mask=torch.ones(2, 4, dtype=torch.bool))),
        ("'max'", lambda: kernels.attention_rows(q, k, reduce="max")),
        ("as many queries", lambda: kernels.received_attention(q[:, :, :4], k)),
        ("cu_seqlens must rise", lambda: kernels.received_attention(q, k, cu_seqlens=torch.tensor([0, 4]))),
        (
            "cu_seqlens must rise",
            lambda: kernels.received_attention(q, k, cu_seqlens=torch.tensor([0, 4, 3, 5])),
        ),
        ("chunk", lambda: kernels.received_attention(q, k, chunk=0)),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
