"""TokenCorr: its counting rules, outliers and aggregation, written out naively."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vtoken.strategies import create, strategy_info

from .common import LAYERS, WIDTH, answer, anyres, image, kept_per_segment, outputs, top

LOW, DEEP = 1, LAYERS - 2


def attention(tokens, layer, segment=0):
    return tokens.provided["cls_attention", layer][segment].mean(0).double()


def naive(tokens, tau=0.9, beta=0.1, kappa=1.5, segment=0):
    """(local, outliers) of an image without padding."""
    keys, n = tokens.provided["keys", LOW][segment].double(), tokens.segments[segment].size
    similar = [
        sum(float(torch.cosine_similarity(keys[i], keys[j], dim=0)) > tau for j in range(n) if j != i)
        for i in range(n)
    ]
    rho = sum(count <= math.ceil(beta * n) for count in similar) / n
    deep = attention(tokens, DEEP, segment).numpy()
    q1, q3 = np.percentile(deep, [25, 75])
    local = top(attention(tokens, LOW, segment), max(1, int(rho * n + 0.5)))
    return local, [i for i in range(n) if deep[i] > q3 + kappa * (q3 - q1)]


def correlated(tokens, share=0.6, seed=0):
    """Keys of some tokens alike."""
    generator = torch.Generator().manual_seed(seed)
    keys = tokens.provided["keys", LOW]
    alike = torch.rand(keys.shape[:2], generator=generator) < share
    keys[alike] = torch.ones(keys.shape[-1], dtype=keys.dtype) + 0.05 * keys[alike]
    return tokens


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"tau": 0.2}, {"beta": 0.4}, {"kappa": 0.3}])
def test_equals_the_rules(seed, options):
    tokens = correlated(image(6, 5, seed=seed), seed=seed)
    local, outliers = naive(tokens, **options)
    chosen = answer(create("token_corr", aggregate=False, **options), tokens)
    assert chosen.keep.tolist() == sorted({*local, *outliers})
    assert chosen.into is None


def test_identical_keys_leave_one_token_and_orthogonal_keys_all():
    tokens = image(4, 4)
    tokens.provided["cls_attention", DEEP][:] = 1 / 17
    tokens.provided["keys", LOW] = torch.ones(1, 16, 2 * WIDTH)
    assert answer(create("token_corr"), tokens).keep.tolist() == top(attention(tokens, LOW), 1)
    tokens.provided["keys", LOW] = torch.eye(16)[None]
    assert answer(create("token_corr"), tokens).keep.tolist() == list(range(16))


def test_similarity_at_tau_and_count_at_beta_are_not_redundant():
    strategy = create("token_corr", tau=0.6, beta=0.25)  # of 4 tokens, more than 1 similar other is needed
    at_tau = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    # the last three have two similar others, the first has cosines of tau only
    assert strategy.density(at_tau) == 0.25
    assert strategy.density(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])) == 1.0
    assert strategy.density(torch.ones(3000, 4), chunk=7) == 0.0


def test_sampling_depends_on_seed_and_crop_alone():
    tokens = correlated(image(6, 6), 0.9)
    draw = create("token_corr", sampling="multinomial", seed=3)
    torch.manual_seed(1)
    first = answer(draw, tokens).keep
    state = torch.random.get_rng_state()
    assert torch.equal(answer(create("token_corr", sampling="multinomial", seed=3), tokens).keep, first)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = [
        answer(create("token_corr", sampling="multinomial", seed=s), tokens).keep.tolist() for s in range(5)
    ]
    assert len({tuple(o) for o in other}) > 1
    assert len({len(o) for o in other}) <= 3  # the draw decides which, not how many, outliers aside


def test_draws_follow_the_attention():
    """One token with half of the attention is drawn first about half of the time."""
    tokens = image(4, 4)
    tokens.provided["cls_attention", DEEP][:] = 1 / 17
    tokens.provided["keys", LOW] = torch.ones(1, 16, 2 * WIDTH)
    tokens.provided["cls_attention", LOW][:] = 1 / 30
    tokens.provided["cls_attention", LOW][..., 5] = 0.5
    hits = sum(
        answer(create("token_corr", sampling="multinomial", seed=s), tokens).keep.tolist() == [5]
        for s in range(400)
    )
    assert 160 <= hits <= 240


def test_aggregation_is_a_convex_combination_by_low_attention():
    tokens = correlated(image(6, 5))
    chosen = answer(create("token_corr"), tokens)
    dense = chosen.dense(30).double()
    torch.testing.assert_close(dense.sum(1), torch.ones(len(chosen.keep)).double(), rtol=1e-5, atol=1e-6)
    assert (dense >= 0).all() and ((dense > 0).sum(0) == 1).all()  # every token goes somewhere
    keys, a = tokens.provided["keys", LOW][0].double(), attention(tokens, LOW)
    groups = {k: [k] for k in chosen.keep.tolist()}
    for i in range(30):
        if i not in groups:
            best = max(
                chosen.keep.tolist(),
                key=lambda k: (float(torch.cosine_similarity(keys[i], keys[k], dim=0)), -k),
            )
            groups[best].append(i)
    want = torch.stack(
        [sum(a[i] * tokens.features[i].double() for i in g) / sum(a[i] for i in g) for g in groups.values()]
    )
    torch.testing.assert_close(outputs(tokens, chosen), want, rtol=1e-4, atol=1e-5)


def test_thumbnail_is_left_alone_without_a_budget():
    tokens = correlated(anyres(2, 2, 4))
    free = kept_per_segment(tokens, answer(create("token_corr"), tokens))
    assert free[0] == 16 and all(1 <= k < 16 for k in free[1:])
    assert kept_per_segment(tokens, answer(create("token_corr", compress_thumbnail=True), tokens))[0] < 16


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.2, 0.5, 1, 7, 40])
@pytest.mark.parametrize(
    "make", [lambda: anyres(2, 2, 4), lambda: anyres(2, 1, 5, top=3), lambda: image(6, 6)]
)
def test_a_budget_is_a_limit_that_starves_no_crop(budget, make):
    tokens = correlated(make(), 0.5)
    chosen = answer(create("token_corr", budget=budget), tokens)
    fed = sum(s.fed for s in tokens.segments)
    limit = max(1, int(fed * budget)) if isinstance(budget, float) else min(budget, fed)
    assert len(chosen.keep) <= limit
    if limit >= 12:
        assert min(kept_per_segment(tokens, chosen)) >= 1
    free = set(answer(create("token_corr", compress_thumbnail=True), tokens).keep.tolist())
    assert set(chosen.keep.tolist()) <= free
    assert len(chosen.keep) == min(limit, len(free))


def test_a_blank_crop_keeps_a_token_under_a_tight_budget():
    tokens = anyres(2, 2, 4, newline=False)
    tokens.provided["cls_attention", DEEP][:] = 1 / 17
    tokens.provided["keys", LOW] = torch.eye(16).repeat(5, 1, 1)
    tokens.provided["keys", LOW][2] = 1.0  # one local token, the other crops have 16
    counts = kept_per_segment(tokens, answer(create("token_corr", budget=10), tokens))
    assert counts[2] == 1 and sum(counts) == 10 and min(counts) >= 1


def test_too_many_outliers_keep_the_highest():
    tokens = image(5, 5)
    deep = torch.full((25,), 0.01)
    deep[[3, 8, 20]] = torch.tensor([0.2, 0.4, 0.3])
    tokens.provided["cls_attention", DEEP][:] = deep
    assert answer(create("token_corr", budget=2), tokens).keep.tolist() == [8, 20]


def test_unpublished_constants_are_named():
    info = strategy_info("token_corr")
    assert info.experimental and create("token_corr").budget is None
    for word in ("tau", "beta", "kappa", "low_layer"):
        assert word in info.differs
    with pytest.raises(ValueError, match="sampling"):
        create("token_corr", sampling="all")
