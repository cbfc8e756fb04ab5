"""Gather, merge and KV compaction of the torch backend against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtoken import kernels

from . import oracle
from .cases import DTYPES, TOLERANCE, indices, merges, tensor

common = settings(max_examples=20, deadline=None, derandomize=True)


@common
@given(merges())
def test_gather_merge_is_the_sum_of_the_rows_that_name_a_column(case):
    x = case[0]
    got, want = kernels.gather_merge(*case), oracle.gather_merge(*case)
    assert got.dtype == x.dtype and got.shape == want.shape
    scale = TOLERANCE[x.dtype] * max(1.0, float(want.abs().max()) if want.numel() else 1.0)
    assert torch.allclose(got.double(), want, rtol=0, atol=scale)
    assert torch.equal(got, kernels.gather_merge(*case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_untouched_row_is_bit_identical(dtype):
    x = torch.tensor(
        [[-0.0, 0.0, torch.inf, 1e-7], [3.0, -0.0, 1.0, 2.0], [0.1, 0.7, 1.3, -2.0]], dtype=dtype
    )
    index, into = torch.tensor([0, 1]), torch.tensor([0, 1, -1])
    copy = x[:2].view(torch.uint8)
    assert torch.equal(kernels.gather_merge(x, index).view(torch.uint8), copy)
    assert torch.equal(kernels.gather_merge(x, index, into).view(torch.uint8), copy)
    assert torch.equal(kernels.gather_merge(x, index, into, torch.ones(3)).view(torch.uint8), copy)


def test_sums_are_not_rounded_to_the_dtype_on_the_way():
    x = torch.ones(1, 4097, 1, dtype=torch.bfloat16)
    got = kernels.gather_merge(x, torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 4097, dtype=torch.long))
    assert got.item() == 4096.0  # adding ones in bfloat16 stops at 256


def test_gradients_of_a_merge():
    x, weight = tensor(0, 2, 6, 3).double().requires_grad_(), tensor(1, 2, 6).double().requires_grad_()
    index, into = indices(2, 2, 6, 3), torch.tensor([[0, 0, 2, -1, 2, -1], [-1, -1, -1, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda x, w: kernels.gather_merge(x, index, into, w), (x, weight))
    x = tensor(0, 2, 6, 3).requires_grad_()
    kernels.gather_merge(x, index).sum().backward()
    want = torch.zeros(2, 6).scatter_add(1, index, torch.ones(2, 3))[..., None].expand(2, 6, 3)
    assert torch.equal(x.grad, want)


@common
@given(merges(most=20), st.booleans())
def test_gather_rows_takes_everything_that_travels(case, unbatched):
    x, index, _, _ = case
    batch, n, _ = x.shape
    ids, mask = torch.arange(batch * n).view(batch, n), tensor(1, batch, n, 1)[..., 0] > 0
    planes = torch.arange(batch * n * 6).view(batch, n, 2, 3).transpose(2, 3)
    tensors = [x, ids, mask, planes]
    if unbatched:
        tensors, index = [t[0] for t in tensors], index[0]
    for got, source in zip(kernels.gather_rows(tensors, index), tensors):
        rows = (
            index
            if unbatched
            else index.reshape(index.shape + (1,) * (source.ndim - 2)).expand(*index.shape, *source.shape[2:])
        )
        want = source[rows] if unbatched else source.gather(1, rows)
        assert got.dtype == source.dtype and torch.equal(got, want)
        assert not got.numel() or got.data_ptr() != source.data_ptr()


@pytest.mark.parametrize("batch, n, m", [(1, 9, 4), (3, 9, 4), (2, 5, 0), (2, 1, 1), (2, 9, 9)])
def test_kv_compaction_copies_and_in_place(batch, n, m):
    keys = [tensor(i, batch, 2, n, 6, dtype=d) for i, d in enumerate(DTYPES)]
    values = [tensor(10 + i, batch, 2, n, 4).transpose(2, 3).contiguous().mT for i in range(3)]
    index = torch.stack([torch.randperm(n)[:m].sort().values for _ in range(batch)])
    want = [torch.stack([t[b][:, index[b]] for b in range(batch)]) for t in [*keys, *values]]
    k, v = kernels.kv_compact(keys, values, index)
    assert all(torch.equal(a, b) for a, b in zip([*k, *v], want)) and len(k) == 3
    k, v = kernels.kv_compact(keys, values, index, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip([*k, *v], want))
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip([*k, *v], [*keys, *values]) if m)


def test_what_does_not_fit_is_refused():
    x, index = tensor(0, 2, 5, 3), torch.tensor([[0, 4], [1, 1]])
    cases = [
        (ValueError, "index", lambda: kernels.gather_merge(x, index[0])),
        (ValueError, "into", lambda: kernels.gather_merge(x, index, index)),
        (ValueError, "without into", lambda: kernels.gather_merge(x, index, weight=torch.ones(2, 5))),
        (IndexError, "0 to 4", lambda: kernels.gather_merge(x, index + 1)),
        (IndexError, "-1 to 1", lambda: kernels.gather_merge(x, index, torch.full((2, 5), 2))),
        (ValueError, "gather_rows", lambda: kernels.gather_rows([x, x[:, :4]], index)),
        (ValueError, "kv_compact", lambda: kernels.kv_compact([x[None]], [x[None]], index)),
        (
            ValueError,
            "ascending",
            lambda: kernels.kv_compact([x[:, None]], [], index.flip(1) * 0, inplace=True),
        ),
        (
            ValueError,
            "at most 5",
            lambda: kernels.kv_compact([x[:, None]], [], torch.zeros(2, 6).long(), inplace=True),
        ),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()
