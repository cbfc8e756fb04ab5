"""Token selection of the torch backend: the float64 oracle, and each method's own promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtoken import kernels

from . import oracle
from .cases import dtypes, layouts, seeds, tensor
from .test_attention import Largest

common = settings(max_examples=20, deadline=None, derandomize=True)
sizes, widths = st.integers(1, 40), st.sampled_from([3, 8, 50])


@common
@given(seeds, sizes, widths, st.integers(0, 30), st.integers(0, 4), dtypes, layouts)
def test_bipartite_match_is_tomes(seed, n, d, r, protect, dtype, layout):
    protect = min(protect, n)
    keys = tensor(seed, 2, n, d, dtype=dtype, layout=layout)
    match = kernels.bipartite_match(keys, r, protect)
    r = min(r, (n - protect) // 2)
    for b in range(2):
        source, target = oracle.masked_tome(keys[b], r, protect)
        assert match.source[b].tolist() == source and match.target[b].tolist() == target
        if r:
            stay = [i for i in range(protect, n) if i % 2 == 0 and i not in source]
            assert match.keep[b].tolist() == [
                *range(protect),
                *stay,
                *(i for i in range(protect, n) if i % 2),
            ]
        assert torch.equal(match.owner[b, match.keep[b]], torch.arange(n - r))
        assert torch.equal(match.owner[b, match.source[b]], match.owner[b, match.target[b]])


def test_bipartite_match_unsorted_keeps_similarity_order_and_nothing_to_merge_moves_nothing():
    keys = tensor(0, 1, 21, 8)
    match = kernels.bipartite_match(keys, 4, sort=False)
    best = oracle.cosines(keys[0])[::2, 1::2].max(1).values
    stay = match.keep[0, : 11 - 4] // 2
    assert (best[stay].diff() <= 0).all() and sorted(match.keep[0].tolist()) == sorted(
        set(range(21)) - set(match.source[0].tolist())
    )
    match = kernels.bipartite_match(keys, 0)
    assert match.source.shape == (1, 0) and match.keep[0].tolist() == match.owner[0].tolist() == list(
        range(21)
    )


@common
@given(seeds, st.integers(2, 30), st.integers(0, 15), st.booleans(), dtypes)
def test_merge_weighted_keeps_what_it_averages(seed, n, r, sized, dtype):
    x, match = tensor(seed, 2, n, 5, dtype=dtype), kernels.bipartite_match(tensor(seed + 1, 2, n, 4), r, 1)
    size = (
        torch.randint(1, 9, (2, n), generator=torch.Generator().manual_seed(seed)).float() if sized else None
    )
    merged, sizes = kernels.merge_weighted(x, match, size)
    weights = torch.ones(2, n, dtype=torch.float64) if size is None else size.double()
    assert merged.dtype == dtype and sizes.dtype == torch.float32
    assert torch.equal(sizes.sum(1).double(), weights.sum(1))
    for b in range(2):
        for j in range(merged.shape[1]):
            group = (match.owner[b] == j).nonzero()[:, 0]
            want = (weights[b, group, None] * x[b, group].double()).sum(0) / weights[b, group].sum()
            assert sizes[b, j] == weights[b, group].sum()
            assert torch.allclose(
                merged[b, j].double(),
                want,
                rtol=1e-2 if dtype != torch.float32 else 1e-5,
                atol=1e-2 if dtype != torch.float32 else 1e-5,
            )
            if len(group) == 1:
                assert torch.equal(merged[b, j], x[b, group[0]])


@common
@given(seeds, sizes, widths, st.booleans(), dtypes, layouts)
def test_farthest_point_is_the_greedy_max_min(seed, n, d, given_start, dtype, layout):
    x = tensor(seed, 2, n, d, dtype=dtype, layout=layout)
    start = n // 2 if given_start else None
    k = max(1, n // 2)
    got = kernels.farthest_point(x, k, start)
    assert got.tolist() == [oracle.farthest_point(x[b], k, start) for b in range(2)]
    assert torch.equal(kernels.farthest_point(x, n, start)[:, :k], got)
    assert kernels.farthest_point(x, n, start).sort().values.tolist() == 2 * [list(range(n))]


def test_farthest_point_properties():
    x = tensor(0, 1, 12, 6)
    scales = torch.rand(1, 12, 1) + 0.1
    turn = torch.linalg.qr(tensor(1, 6, 6)).Q
    want = kernels.farthest_point(x, 5)
    assert torch.equal(kernels.farthest_point(x * scales, 5), want)
    assert torch.equal(kernels.farthest_point(x @ turn, 5), want)
    assert torch.equal(kernels.farthest_point(x, 5, torch.tensor([3]))[:, :1], torch.tensor([[3]]))
    centres = torch.eye(6).repeat_interleave(4, 0)[torch.randperm(24)][None]
    picks = kernels.farthest_point(centres + 0.01 * tensor(2, 1, 24, 6), 6)
    assert sorted(centres[0, picks[0]].argmax(-1).tolist()) == list(range(6))


def test_ties_go_to_the_lower_index():
    x = tensor(0, 1, 300, 64)
    x[:, 1::2] = x[:, ::2]  # every token twice
    x[0, 200:] = x[0, 7]
    picks = kernels.farthest_point(x, 140)[0]
    assert not (picks[:100] % 2).any() and (picks[:100] < 200).all()  # no copy while anything new is left
    assert picks[100:].tolist() == list(range(1, 81, 2))
    picks = kernels.greedy_map(x, torch.ones(1, 300), 40)[0]
    assert not (picks % 2).any() and (picks < 200).all() and picks[0] == 0
    same = torch.ones(1, 9, 4)
    assert kernels.farthest_point(same, 9)[0].tolist() == list(range(9))
    assert kernels.greedy_map(same, torch.ones(1, 9), 9)[0].tolist() == list(range(9))
    assert kernels.farthest_point(torch.zeros(1, 5, 4), 3)[0].tolist() == [0, 1, 2]


@common
@given(seeds, st.integers(1, 20), dtypes, layouts)
def test_greedy_map_maximises_the_determinant(seed, n, dtype, layout):
    x, quality = tensor(seed, 2, n, 24, dtype=dtype, layout=layout), tensor(seed + 1, 2, n).exp()
    k = max(1, n // 2)
    got = kernels.greedy_map(x, quality, k)
    assert got.tolist() == [oracle.greedy_map(x[b], quality[b], k) for b in range(2)]
    assert torch.equal(kernels.greedy_map(x, quality * 1e-9, k), got)
    assert kernels.greedy_map(x, quality, n).sort().values.tolist() == 2 * [list(range(n))]


@pytest.mark.parametrize(("decay", "power", "seed"), [(0.1, 8, 0), (0.2, 4, 1), (0.2, 8, 1)])
def test_greedy_map_names_no_token_twice_when_little_is_left_to_explain(decay, power, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(120, 128, generator=generator) * torch.exp(-decay * torch.arange(128)))[None]
    quality = torch.rand(1, 120, generator=generator) ** power + 1e-6
    assert len(set(kernels.greedy_map(x, quality, 100)[0].tolist())) == 100


def test_greedy_map_falls_back_on_quality_once_the_rank_is_used_up():
    x, quality = tensor(0, 1, 30, 4), tensor(1, 1, 30).abs() + 0.5
    picks = kernels.greedy_map(x, quality, 12)[0]
    assert picks[:4].tolist() == oracle.greedy_map(x[0], quality[0], 4)
    rest = quality[0].clone()
    rest[picks[:4]] = 0
    assert picks[4:].tolist() == rest.argsort(descending=True)[:8].tolist()
    assert kernels.greedy_map(x, torch.zeros(1, 30), 5)[0].tolist() == [0, 1, 2, 3, 4]


@common
@given(seeds, sizes, widths, st.booleans(), dtypes, layouts)
def test_greedy_cover_adds_what_covers_most(seed, n, m, weighted, dtype, layout):
    values = tensor(seed, 2, n, m, dtype=dtype, layout=layout)
    weight = tensor(seed + 1, 2, n).exp() if weighted else None
    # past the number of things, nothing is left to cover
    k = max(1, min(n // 2, m // 2))
    got = kernels.greedy_cover(values, k, weight)
    weights = torch.ones(2, n) if weight is None else weight
    assert got.tolist() == [oracle.greedy_cover(values[b], weights[b], k) for b in range(2)]
    assert torch.equal(kernels.greedy_cover(values * 1e-4, k, weight), got) or dtype != torch.float32
    assert torch.equal(kernels.greedy_cover(values, n, weight)[:, :k], got)
    assert kernels.greedy_cover(values, n, weight).sort().values.tolist() == 2 * [list(range(n))]


def test_greedy_cover_of_many_tokens():
    x = torch.nn.functional.normalize(tensor(3, 1, 300, 12), dim=-1)
    values, weight = x @ x.mT, tensor(4, 1, 300).sigmoid()
    want = oracle.greedy_cover(values[0], weight[0], 60)
    assert kernels.greedy_cover(values, 60, weight)[0].tolist() == want
    assert kernels.greedy_cover(values.double(), 60, weight)[0].tolist() == want


def test_greedy_cover_properties():
    x = torch.nn.functional.normalize(tensor(0, 1, 20, 8), dim=-1)
    x[:, 10:] = x[:, :10]  # every token twice
    values, weight = x @ x.mT, torch.ones(1, 20)
    picks = kernels.greedy_cover(values, 20)[0].tolist()
    assert sorted(picks[:10]) == list(range(10)) and picks[10:] == list(range(10, 20))
    weight[0, picks[0]] = 0
    assert kernels.greedy_cover(values, 1, weight)[0, 0] == picks[0] + 10
    assert kernels.greedy_cover(values, 3, torch.zeros(1, 20))[0].tolist() == [0, 1, 2]
    assert kernels.greedy_cover(-values.abs(), 3)[0].tolist() == [0, 1, 2]
    assert kernels.greedy_cover(values[..., :0], 3)[0].tolist() == [0, 1, 2]


def test_no_matrix_larger_than_the_features():
    x = tensor(0, 1, 900, 16)
    for call in (lambda: kernels.farthest_point(x, 4), lambda: kernels.greedy_map(x, x[..., 0].exp(), 4)):
        with Largest() as largest:
            call()
        assert largest.elements <= 256 * 900


@pytest.mark.parametrize("n, k", [(0, 0), (5, 0)])
def test_nothing_to_select(n, k):
    x = tensor(0, 2, n, 4)
    assert kernels.farthest_point(x, k).shape == kernels.greedy_map(x, x[..., 0], k).shape == (2, 0)
    assert kernels.greedy_cover(x, k).shape == (2, 0)


def test_what_does_not_fit_is_refused():
    x = tensor(0, 2, 5, 4)
    for words, call in [
        ("0 to 5 of 5", lambda: kernels.farthest_point(x, 6)),
        ("0 to 4", lambda: kernels.farthest_point(x, 2, 5)),
        ("start of shape", lambda: kernels.farthest_point(x, 2, torch.tensor([1]))),
        ("features", lambda: kernels.farthest_point(x[0], 2)),
        ("0 to 5 of 5", lambda: kernels.greedy_cover(x, 6)),
        ("values", lambda: kernels.greedy_cover(x[0], 2)),
        ("weight of shape", lambda: kernels.greedy_cover(x, 2, x[..., :2, 0])),
        ("quality of shape", lambda: kernels.greedy_map(x, x[:, :3, 0], 2)),
        ("protect", lambda: kernels.bipartite_match(x, 2, 6)),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
