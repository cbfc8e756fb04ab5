"""FarCover against loops over tokens in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mechanism.common import assert_same, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from vtoken.strategies import create
from vtoken.tokens import Segment

from .common import answer, anyres, build, image, separators_kept, video


def distance(a, b):
    length = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    return 1 - (sum(x * y for x, y in zip(a, b)) / length if length else 0.0)


def demand_of(tokens, rows, relevance):
    if tokens.question_attention is None:
        return [1.0] * len(rows)
    heads = [[row[i] for i in rows] for row in tokens.question_attention.double().tolist()]
    seen = [0.0] * len(rows)
    for row in heads:
        e = [math.exp(v - max(row)) for v in row]
        seen = [s + x / sum(e) / len(heads) for s, x in zip(seen, e)]
    return [1 - relevance + relevance * len(rows) * s for s in seen]


def naive(tokens, k, relevance=0.25, across=0.8):
    rows = [i for i, cell in enumerate(tokens.cells.tolist()) if cell >= 0]
    x, demand = tokens.features[rows].double().tolist(), demand_of(tokens, rows, relevance)
    units = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in x]
    mean = [sum(column) / len(x) for column in zip(*units)]
    far, chosen = [distance(a, mean) for a in x], []
    ends = list(itertools.accumulate(s.size for s in tokens.segments))
    frame = [sum(tokens.cells[i] >= end for end in ends) if tokens.modality == "video" else 0 for i in rows]

    def nearer(i, j):
        return max(0.0, far[j] - distance(x[i], x[j])) * (1 if frame[i] == frame[j] else across)

    covered = [0.0] * len(x)
    for _ in range(k):
        gain = [
            sum(d * max(0.0, nearer(i, j) - covered[j]) for j, d in enumerate(demand)) for i in range(len(x))
        ]
        left = [i for i in range(len(x)) if i not in chosen]
        best = max(gain[i] for i in left)
        chosen.append(min(i for i in left if gain[i] >= best * (1 - 1e-5)))
        covered = [max(c, nearer(chosen[-1], j)) for j, c in enumerate(covered)]
    return sorted(rows[i] for i in chosen)


INPUTS = {
    "image": lambda seed: image(5, 4, seed=seed),
    "without text": lambda seed: image(4, 4, seed=seed, text=0),
    "crops": lambda seed: anyres(2, 1, 3, seed=seed),
    "video": lambda seed: video(4, 2, 3, trailing=1, seed=seed),
}


@pytest.mark.parametrize("kind", INPUTS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    budget=st.sampled_from([1, 0.05, 0.2, 0.5, 3]),
    relevance=st.sampled_from([0.0, 0.25, 0.9]),
    across=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
)
def test_equals_loops(kind, seed, budget, relevance, across):
    tokens = INPUTS[kind](seed)
    strategy = create("farcover", budget=budget, relevance=relevance, across=across)
    n = sum(s.fed for s in tokens.segments)
    frames = len(tokens.segments) if kind == "video" else 1
    k = max(1, round(budget * n)) if isinstance(budget, float) else min(n, budget * frames)
    kept = answer(strategy, tokens).keep.tolist()
    assert kept == naive(tokens, k, relevance, across)
    assert len(kept) == strategy.total(tokens.segments) == sum(strategy.counts(tokens.segments))


def test_each_distinct_token_comes_before_a_repeated_one():
    tokens = image(4, 4, seed=3)
    features = tokens.features.clone()
    features[8:] = features[:8]
    kept = answer(create("farcover", budget=8), replace(tokens, features=features)).keep
    assert (kept % 8).unique().numel() == 8


def test_equal_and_zero_features_keep_as_many_as_the_budget_says():
    tokens = image(4, 4, seed=3)
    for value in (0.0, 1.0):
        same = replace(tokens, features=torch.full_like(tokens.features, value))
        assert answer(create("farcover", budget=3), same).keep.numel() == 3


def test_the_question_moves_the_choice_and_relevance_0_does_not_read_it():
    tokens = build([Segment("image", (6, 6))], seed=5)
    looks = torch.zeros_like(tokens.question_attention)
    looks[:, 7] = 9.0
    asked = replace(tokens, question_attention=looks)
    assert 7 in answer(create("farcover", budget=1, relevance=0.9), asked).keep
    blind = create("farcover", budget=4, relevance=0.0)
    assert not blind.needs(tokens.tower).text
    assert torch.equal(
        answer(blind, asked).keep, answer(blind, replace(tokens, question_attention=None)).keep
    )


def test_scales_change_nothing_and_order_moves_with_the_tokens():
    tokens = image(5, 5, seed=4)
    strategy = create("farcover", budget=7)
    want = answer(strategy, tokens).keep
    scaled = replace(tokens, features=tokens.features * (1 + torch.arange(25)[:, None]))
    assert torch.equal(answer(strategy, scaled).keep, want)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    moved = replace(
        tokens, features=tokens.features[order], question_attention=tokens.question_attention[:, order]
    )
    assert sorted(order[answer(strategy, moved).keep].tolist()) == want.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_default_dtype_of_new_tensors_changes_nothing(dtype):
    tokens, strategy = video(6, 5, 5, seed=1), create("farcover", budget=0.3, relevance=0.0)
    want, demand = answer(strategy, tokens).keep, strategy.demand(tokens)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(answer(strategy, tokens).keep, want)
        assert strategy.demand(tokens).dtype == demand.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_rows_that_are_no_patch_are_dropped():
    tokens, strategy = anyres(2, 2, 4), create("farcover", budget=0.9)
    kept = answer(strategy, tokens)
    assert separators_kept(tokens, kept) == 0
    assert len(kept.keep) == strategy.total(tokens.segments, 8) == 72


@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "qwen2_5_vl", "internvl", "qwen3_vl", "qwen2_5_vl/video"]
)
def test_on_a_model(name):
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("ragged")
    with patched(model, create("farcover", budget=0.4)) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected(name, inputs, spy))


def test_what_lies_in_every_frame_is_kept_in_more_of_them_the_less_a_token_counts_across():
    tokens = video(4, 2, 3, seed=2)
    features = tokens.features.clone()
    features[6:] = features[:6].repeat(3, 1)
    again = replace(tokens, features=features, question_attention=None)
    alone, together = (
        answer(create("farcover", budget=3, relevance=0, across=across), again).keep for across in (0.0, 1.0)
    )
    assert (alone // 6).bincount().tolist() == [3, 3, 3, 3] and (alone % 6).unique().numel() == 3
    assert (together % 6).unique().numel() == 6


def test_options_out_of_range():
    with pytest.raises(ValueError, match="across in "):
        create("farcover", across=1.5)
    for options in (dict(relevance=1.0), dict(depth=-0.1)):
        with pytest.raises(ValueError, match="relevance and depth must lie in"):
            create("farcover", **options)
