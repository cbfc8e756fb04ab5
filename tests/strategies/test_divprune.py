"""DivPrune against brute force in float64."""

from __future__ import annotations

import pytest
import torch

from vtoken.strategies import create

from .common import answer, anyres, build, image, kept_per_segment, separators_kept, video


def distances(x):
    x = x.double()
    norm = x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    d = 1 - (x / norm) @ (x / norm).T
    return d.fill_diagonal_(0.0)


def brute(x, count):
    """Selection order by the definition, one comparison at a time."""
    d, n = distances(x), len(x)
    nearest = [min((float(d[i, j]) for j in range(n) if j != i), default=0.0) for i in range(n)]
    order = [max(range(n), key=lambda i: (nearest[i], -i))]
    while len(order) < count:
        left = [i for i in range(n) if i not in order]
        order.append(max(left, key=lambda i: (min(float(d[i, j]) for j in order), -i)))
    return order


@pytest.mark.parametrize("budget", [0.098, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    "make", [lambda: image(5, 3), lambda: anyres(1, 2, 3, left=1, newline=False), lambda: video(3)]
)
def test_equals_brute_force(budget, make):
    tokens = make()
    count = max(1, round(budget * len(tokens)))
    assert answer(create("divprune", budget=budget), tokens).keep.tolist() == sorted(
        brute(tokens.features, count)
    )


@pytest.mark.parametrize(
    "n,budget,count", [(576, 0.098, 56), (10, 0.25, 2), (14, 0.25, 4), (6, 0.25, 2), (3, 0.01, 1)]
)
def test_count_rounds_half_to_even(n, budget, count):
    tokens, strategy = image(1, n), create("divprune", budget=budget)
    assert len(answer(strategy, tokens).keep) == count == sum(strategy.counts(tokens.segments))


def test_newline_rows_count_and_compete():
    tokens = anyres(2, 2, 4)
    chosen = answer(create("divprune", budget=0.2), tokens)
    assert len(tokens) == 16 + 64 + 8 and len(chosen.keep) == round(0.2 * 88)
    assert separators_kept(tokens, chosen) <= 1


def test_protected_newlines_stay_on_top():
    tokens = anyres(2, 2, 4)
    chosen = answer(create("divprune", budget=0.25, protect_newline=True), tokens)
    assert separators_kept(tokens, chosen) == 8 and len(chosen.keep) == 8 + 20
    assert set(chosen.keep.tolist()) >= set(tokens.separator_rows.tolist())


def test_scale_and_rotation_change_nothing():
    tokens = image(5, 5, seed=3)
    strategy = create("divprune", budget=0.3)
    want = answer(strategy, tokens).keep
    generator = torch.Generator().manual_seed(1)
    tokens.features = tokens.features * (torch.rand(25, 1, generator=generator) + 0.1)
    assert torch.equal(answer(strategy, tokens).keep, want)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    tokens.features = tokens.features @ rotation
    assert torch.equal(answer(strategy, tokens).keep, want)


def test_larger_budgets_contain_smaller_ones_and_lie_closer():
    tokens, d = image(5, 5), distances(image(5, 5).features)
    before, apart = set(), float("inf")
    for count in range(2, 25):
        now = answer(create("divprune", budget=count), tokens).keep
        smallest = float((d[now][:, now] + 9 * torch.eye(count)).min())
        assert before < set(now.tolist()) and smallest <= apart + 1e-6
        before, apart = set(now.tolist()), smallest


def test_duplicates_are_kept_once_while_there_is_anything_else():
    tokens = image(4, 4)
    tokens.features[8:] = tokens.features[8]
    assert sum(i >= 8 for i in answer(create("divprune", budget=9), tokens).keep.tolist()) == 1
    for count in (15, 16):
        assert len(answer(create("divprune", budget=count), tokens).keep.unique()) == count


def test_one_token_per_cluster():
    centres = torch.eye(16)[:5]
    tokens = image(5, 4)
    tokens.features = centres.repeat_interleave(4, 0) + 0.01 * torch.randn(20, 16)
    assert (answer(create("divprune", budget=5), tokens).keep // 4).tolist() == [0, 1, 2, 3, 4]


def test_a_video_is_one_set():
    """All frames but one are the same picture: its tokens are needed once."""
    tokens = video(4, 2, 4)
    tokens.features[:24] = tokens.features[:8].repeat(3, 1)
    chosen = answer(create("divprune", budget=0.5), tokens)
    assert len(chosen.keep) == 16 and kept_per_segment(tokens, chosen) == [8, 0, 0, 8]
    assert len(answer(create("divprune", budget=3), tokens).keep) == 12


def test_more_tokens_than_channels_agrees_with_the_matrix():
    """Above the width of the features no cosine matrix is kept."""
    from vtoken.tokens import Segment

    tokens = build([Segment("image", (6, 9))])
    assert len(tokens) > tokens.features.shape[1]
    assert answer(create("divprune", budget=20), tokens).keep.tolist() == sorted(brute(tokens.features, 20))
