"""The Triton kernels against the float64 oracle and the torch twins.

`test_triton.py` runs this file in a process of its own: interpreted on the CPU (TRITON_INTERPRET=1 has to be
set before triton is imported), or on a CUDA device.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtoken import kernels
from vtoken.kernels.triton import attention, select

from . import oracle
from .cases import (
    DTYPES,
    TOLERANCE,
    bounds,
    dtypes,
    heads,
    indices,
    layouts,
    masks,
    merges,
    packed_groups,
    seeds,
    tensor,
)

DEVICE = os.environ.get("VTOKEN_TEST_DEVICE", "cpu")
MANY = DEVICE == "cuda"
common = settings(
    max_examples=25 if MANY else 3,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)


def on_device(value):
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    return [on_device(v) for v in value] if isinstance(value, list) else value


def triton(name: str, *args, repeat: bool = MANY, **kwargs):
    """A kernel's answer, on the CPU; on a GPU asked twice, since a race or an unset buffer may be right only
    once.
    """
    args, kwargs = [on_device(a) for a in args], {k: on_device(v) for k, v in kwargs.items()}
    with kernels.backend("triton"):
        answers = [getattr(kernels, name)(*args, **kwargs) for _ in range(2 if repeat else 1)]
    first, again = ([r] if isinstance(r, Tensor) else list(r) for r in (answers[0], answers[-1]))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    return first[0].cpu() if len(first) == 1 else [r.cpu() for r in first]


def torch_twin(name: str, *args, **kwargs):
    with kernels.backend("torch"):
        return getattr(kernels, name)(*args, **kwargs)


@common
@given(merges(most=300 if MANY else 12))
def test_gather_merge(case):
    x, index, into, weight = case
    got, want = triton("gather_merge", *case), oracle.gather_merge(x, index, into, weight)
    scale = TOLERANCE[x.dtype] * max(1.0, float(want.abs().max()) if want.numel() else 1.0)
    assert got.dtype == x.dtype and torch.allclose(got.double(), want, rtol=0, atol=scale)
    if into is None:
        assert torch.equal(got, torch_twin("gather_merge", *case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_untouched_row_is_bit_identical(dtype):
    x = torch.tensor(
        [[-0.0, 0.0, torch.inf, 1e-7], [3.0, -0.0, 1.0, 2.0], [0.1, 0.7, 1.3, -2.0]], dtype=dtype
    )
    index, into = torch.tensor([0, 1]), torch.tensor([0, 1, -1])
    for args in [(x, index), (x, index, into), (x, index, into, torch.ones(3))]:
        assert torch.equal(triton("gather_merge", *args).view(torch.uint8), x[:2].view(torch.uint8))


def test_rows_counted_and_sorted_agree(monkeypatch):
    x, index, into = tensor(0, 2, 70, 3), indices(1, 2, 70, 9), indices(2, 2, 9, 70, low=-1)
    into[into == 4] = 3  # a column that nothing names
    counted = triton("gather_merge", x, index, into, tensor(3, 2, 70))
    monkeypatch.setattr("vtoken.kernels.triton.gather.COUNTED", 0)
    assert torch.equal(triton("gather_merge", x, index, into, tensor(3, 2, 70)), counted)
    assert torch.allclose(counted.double(), oracle.gather_merge(x, index, into, tensor(3, 2, 70)), atol=1e-5)


def test_wide_rows_take_several_blocks():
    x, index, into = tensor(0, 1, 5, 4100), torch.tensor([[3, 0]]), torch.tensor([[1, -1, 1, 0, 1]])
    assert torch.allclose(
        triton("gather_merge", x, index, into).double(), oracle.gather_merge(x, index, into, None), atol=1e-5
    )


@pytest.mark.parametrize("width", [1, 3, 8, 1040])
def test_gather_rows(width):
    index = indices(1, 2, 19, 7)
    types = (torch.bool, torch.int64, torch.bfloat16, torch.float32)
    tensors = [tensor(i, 2, 19, width, layout=i).mul(9).to(dtype) for i, dtype in enumerate(types)]
    tensors += [tensors[0][..., 0], torch.arange(38).view(2, 19), torch.zeros(2, 19, 0)]
    for some in (tensors, tensors[2:4]):
        for got, want in zip(triton("gather_rows", some, index), torch_twin("gather_rows", some, index)):
            assert got.dtype == want.dtype and torch.equal(got, want)
    assert triton("gather_rows", [torch.arange(5), torch.arange(5)], torch.tensor([4, 1]))[0].tolist() == [
        4,
        1,
    ]


@pytest.mark.parametrize("m", [0, 37, 150])
def test_kv_compaction(m):
    keys = [tensor(i, 2, 3, 150, 24, dtype=d) for i, d in enumerate([torch.bfloat16, torch.float16])]
    values = [tensor(9 + i, 2, 3, 150, 7, layout=i) for i in range(2)]
    index = torch.stack([torch.randperm(150)[:m].sort().values for _ in range(2)])
    with kernels.backend("torch"):
        want = kernels.kv_compact(keys, values, index)
    with kernels.backend("triton"):
        keys, values, index = on_device(keys), on_device(values), on_device(index)
        for inplace in (False, True):
            got = kernels.kv_compact(keys, values, index, inplace=inplace)
            assert all(torch.equal(a.cpu(), b) for g, w in zip(got, want) for a, b in zip(g, w))
            assert not inplace or not m or all(a.data_ptr() == b.data_ptr() for a, b in zip(got[0], keys))


@common
@given(seeds, st.sampled_from([2, 3, 4, 16]), st.integers(1, 4000 if MANY else 41))
def test_packed_codes(seed, levels, n):
    codes = torch.randint(levels, (3, 2, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    for given_codes in (codes, codes.transpose(0, 1)):
        assert torch.equal(
            triton("pack_codes", given_codes, levels), torch_twin("pack_codes", given_codes, levels)
        )


@common
@given(packed_groups())
def test_rows_of_packed_codes(case):
    codes, step, *form = case
    packed = torch_twin("pack_codes", codes, form[1])
    got, want = triton("unpack_rows", packed, step, *form), torch_twin("unpack_rows", packed, step, *form)
    assert got.dtype == want.dtype and torch.allclose(got, want, rtol=2 * TOLERANCE[step.dtype], atol=1e-5)


@common
@given(heads(most=600 if MANY else 70, rows=5 if MANY else 2), st.data())
def test_attention_rows(qk, data):
    q, k = qk
    mask = data.draw(masks(q.shape[0], q.shape[2], k.shape[2]))
    want = oracle.attention(q, k, None, mask)
    for reduce, total in ((None, want), ("sum", want.sum((1, 2))), ("mean", want.mean((1, 2)))):
        got = triton("attention_rows", q, k, mask=mask, reduce=reduce)
        assert got.dtype == torch.float32 and got.shape == total.shape
        assert torch.allclose(got.double(), total, rtol=0, atol=2e-5 if reduce == "sum" else 4e-6)


def test_attention_rows_over_several_stretches_of_keys(monkeypatch):
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 64)
    q, k = tensor(0, 1, 2, 18, 4), tensor(1, 1, 1, 600, 4)
    mask = torch.ones(1, 18, 600, dtype=torch.bool)
    mask[0, 0, :520], mask[0, 1] = False, False
    want = oracle.attention(q, k, None, mask)
    assert torch.allclose(triton("attention_rows", q, k, mask=mask).double(), want, atol=1e-6)
    assert torch.allclose(
        triton("attention_rows", q, k, mask=mask, reduce="sum").double(), want.sum((1, 2)), atol=1e-5
    )


@common
@given(heads(most=300 if MANY else 70), st.data())
def test_received_attention(qk, data):
    q, k = qk
    cuts = data.draw(bounds(q.shape[2]))
    want = oracle.received(q, k, None, cuts)
    got = triton("received_attention", q, k, cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
    assert got.dtype == torch.float32 and torch.allclose(got.double(), want, rtol=0, atol=4e-6)
    if len(cuts) == 2:
        assert torch.allclose(triton("received_attention", q, k).double(), want, rtol=0, atol=4e-6)


def test_head_widths_that_do_not_fit_go_to_the_twin():
    q, k = tensor(0, 1, 1, 2, 300), tensor(1, 1, 1, 9, 300)
    assert torch.allclose(
        triton("attention_rows", q, k).double(), oracle.attention(q, k, None, None), atol=1e-6
    )


@common
@given(
    seeds,
    st.integers(1, 300 if MANY else 80),
    st.sampled_from([3, 50]),
    st.integers(0, 40),
    st.integers(0, 3),
    dtypes,
)
def test_bipartite_match_selects_what_torch_selects(seed, n, d, r, protect, dtype):
    keys = tensor(seed, 2, n, d, dtype=dtype, layout=seed % 4)
    for sort in (True, False):
        got = triton("bipartite_match", keys, r, min(protect, n), sort)
        for a, b in zip(got, torch_twin("bipartite_match", keys, r, min(protect, n), sort)):
            assert torch.equal(a, b)


@common
@given(seeds, st.integers(1, 400 if MANY else 40), st.sampled_from([3, 50]), dtypes, layouts, st.booleans())
def test_selections_are_those_of_torch(seed, n, d, dtype, layout, twice):
    x, quality = tensor(seed, 2, n, d, dtype=dtype, layout=layout), tensor(seed + 1, 2, n).exp()
    if twice:
        x, quality = x[:, torch.arange(n) // 2], quality[:, torch.arange(n) // 2]
    k = max(1, n // 4)
    assert torch.equal(triton("farthest_point", x, k), torch_twin("farthest_point", x, k))
    assert torch.equal(triton("farthest_point", x, k, n - 1), torch_twin("farthest_point", x, k, n - 1))
    k = min(k, d)  # past the rank, gains are rounding
    assert torch.equal(triton("greedy_map", x, quality, k), torch_twin("greedy_map", x, quality, k))


@common
@given(
    seeds, st.integers(1, 400 if MANY else 40), st.sampled_from([3, 50, 300]), dtypes, layouts, st.booleans()
)
def test_coverage_is_that_of_torch(seed, n, m, dtype, layout, twice):
    values, weight = tensor(seed, 2, n, m, dtype=dtype, layout=layout), tensor(seed + 1, 2, n).exp()
    if twice:
        values, weight = values[:, torch.arange(n) // 2], weight[:, torch.arange(n) // 2]
    before = weight.clone()
    for k in (1, max(1, n // 4), n):
        assert torch.equal(
            triton("greedy_cover", values, k, weight), torch_twin("greedy_cover", values, k, weight)
        )
    assert torch.equal(weight, before)


def test_greedy_map_names_no_token_twice_when_little_is_left_to_explain():
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(40, 32, generator=generator) * torch.exp(-0.5 * torch.arange(32)))[None]
    quality = torch.rand(1, 40, generator=generator) ** 8 + 1e-6
    assert len(set(triton("greedy_map", x, quality, 36)[0].tolist())) == 36


def test_selections_shared_by_several_programs(monkeypatch):
    """One launch a step, so that programs that run one after another can agree without a barrier."""
    monkeypatch.setattr(select, "multiprocessors", lambda device: 8)
    monkeypatch.setattr(select, "COOPERATIVE", False)
    n = 45 if MANY else 20
    x, quality = tensor(0, 2, n, 70), tensor(1, 2, n).exp()
    x[:, 10:15] = x[:, :5]
    assert torch.equal(triton("farthest_point", x, 7), torch_twin("farthest_point", x, 7))
    assert torch.equal(triton("greedy_map", x, quality, 5), torch_twin("greedy_map", x, quality, 5))
    for k in (7, n):
        got = triton("greedy_cover", x, k, quality)
        assert torch.equal(got, torch_twin("greedy_cover", x, k, quality))
    x = x.transpose(0, 1).contiguous().transpose(0, 1)  # norms of such rows come back in the same odd layout
    assert torch.equal(triton("farthest_point", x, 7), torch_twin("farthest_point", x, 7))
    assert triton("greedy_map", x[:, :6], quality[:, :6], 6).sort().values.tolist() == 2 * [list(range(6))]


def test_repeated_calls_give_equal_bits():
    x, into = tensor(0, 2, 9, 20), indices(1, 2, 4, 9)
    triton("gather_merge", x, into[:, :4], into, x[..., 0], repeat=True)
    triton("attention_rows", x[:, None, :2], x[:, None], repeat=True)
    triton("received_attention", x[:, None], x[:, None], repeat=True)
    triton("greedy_map", x, x[..., 0].abs(), 4, repeat=True)
    triton("greedy_cover", x, 4, repeat=True)


def test_empty_inputs():
    x = tensor(0, 2, 5, 4)
    nothing = torch.empty(2, 0, dtype=torch.long)
    assert triton("gather_merge", x, nothing).shape == (2, 0, 4)
    assert triton("gather_merge", x[:, :0], nothing, nothing).shape == (2, 0, 4)
    assert triton("gather_rows", [x, x], nothing)[1].shape == (2, 0, 4)
    assert triton("farthest_point", x, 0).shape == triton("greedy_map", x, x[..., 0], 0).shape == (2, 0)
    assert triton("farthest_point", x[:0], 3).shape == triton("greedy_cover", x[:0], 3).shape == (0, 3)
    assert triton("greedy_cover", x, 0).shape == (2, 0)
    assert triton("greedy_cover", x[..., :0], 2).tolist() == [[0, 1]] * 2
    assert triton("attention_rows", x[:, None, :0], x[:, None], reduce="mean").tolist() == [[0.0] * 5] * 2
    assert triton("received_attention", x[:, None, :0], x[:, None, :0]).shape == (2, 0)


def test_tensors_that_require_grad_use_the_twin():
    x = tensor(0, 2, 5, 4).requires_grad_()
    with kernels.backend("triton"):
        kernels.gather_merge(on_device(x), on_device(indices(1, 2, 5, 3))).sum().backward()
    assert x.grad.sum() == 24


def test_values_that_are_no_numbers_give_indices_of_tokens():
    """An index outside would end the process's use of a GPU."""
    x = tensor(0, 1, 33, 8)
    x[0, 4] = float("nan")
    for picks in (triton("farthest_point", x, 5), triton("greedy_map", x, torch.ones(1, 33), 5)):
        assert int(picks.min()) >= 0 and int(picks.max()) < 33
    values = (x @ x.mT).clamp(min=0)
    assert int(triton("greedy_cover", values, 5, torch.ones(1, 33)).max()) < 33
