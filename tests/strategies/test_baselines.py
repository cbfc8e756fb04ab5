"""The baselines: random, uniform, pool."""

from __future__ import annotations

import pytest
import torch

from vtoken.strategies import create
from vtoken.strategies.pool import pooled_grid

from .common import answer, anyres, image, kept_per_segment, outputs, separators_kept, video


def test_random_depends_on_the_seed_and_the_grid_alone():
    first, second = image(6, 6, seed=1), image(6, 6, seed=2, dtype=torch.float16)
    strategy = create("random", budget=0.3)
    torch.manual_seed(5)
    keep = answer(strategy, first).keep
    assert len(keep) == 10 and torch.equal(answer(strategy, second).keep, keep)
    assert not torch.equal(answer(create("random", budget=0.3, seed=1), first).keep, keep)


def test_random_is_even():
    tokens, hits = image(1, 8), torch.zeros(8)
    for seed in range(400):
        hits[answer(create("random", budget=0.25, seed=seed), tokens).keep] += 1
    assert hits.sum() == 800 and (hits - 100).abs().max() < 45


def test_uniform_is_evenly_spaced_in_every_segment():
    assert answer(create("uniform", budget=3), image(1, 9)).keep.tolist() == [1, 4, 7]
    assert answer(create("uniform", budget=1), image(3, 3)).keep.tolist() == [4]
    tokens = anyres(2, 2, 4)
    chosen = answer(create("uniform", budget=0.25), tokens)
    assert kept_per_segment(tokens, chosen) == [4] * 5 and separators_kept(tokens, chosen) == 0
    for s in range(5):
        mine = tokens.cells[chosen.keep[tokens.segment_of[chosen.keep] == s]] - 16 * s
        assert mine.tolist() == [2, 6, 10, 14]


def pooled(features, height, width, rows, columns):
    """Mean of every rectangle, pixel by pixel."""
    groups: dict[tuple[int, int], list] = {}
    for i in range(height * width):
        y, x = divmod(i, width)
        groups.setdefault((y * rows // height, x * columns // width), []).append(features[i].double())
    return torch.stack([sum(v) / len(v) for _, v in sorted(groups.items())])


@pytest.mark.parametrize("height,width,budget", [(4, 4, 4), (6, 4, 6), (5, 7, 6), (9, 2, 4), (3, 8, 0.3)])
def test_pool_is_the_mean_of_rectangles(height, width, budget):
    tokens = image(height, width)
    strategy = create("pool", budget=budget)
    chosen = answer(strategy, tokens)
    most = budget if isinstance(budget, int) else int(height * width * budget)
    rows, columns = pooled_grid((height, width), most)
    assert len(chosen.keep) == rows * columns == sum(strategy.counts(tokens.segments)) <= most
    want, got = pooled(tokens.features, height, width, rows, columns), outputs(tokens, chosen)
    # the central cells of neighbours may change places in raster order
    nearest = torch.cdist(got, want).argmin(1)
    assert sorted(nearest.tolist()) == list(range(rows * columns))
    torch.testing.assert_close(got, want[nearest], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [(24, 24), (27, 27), (10, 40), (40, 10), (1, 9), (13, 17)])
def test_pooled_grid_fills_the_budget_and_keeps_the_shape(grid):
    for budget in (1, 2, 5, 16, 50, 144, 10_000):
        rows, columns = pooled_grid(grid, budget)
        assert 1 <= rows <= grid[0] and 1 <= columns <= grid[1] and rows * columns <= budget
        if budget < grid[0] * grid[1] and min(grid) > 1:
            assert rows * columns > budget / 2


def test_pool_on_frames_and_crops():
    tokens = video(3, 4, 4, trailing=1)
    chosen = answer(create("pool", budget=4), tokens)
    assert kept_per_segment(tokens, chosen) == [4, 4, 4] and separators_kept(tokens, chosen) == 0
    crops = anyres(2, 2, 4, top=2)
    chosen = answer(create("pool", budget=0.25), crops)
    assert kept_per_segment(crops, chosen) == [4, 2, 2, 2, 2]
    dense = chosen.dense(len(crops))
    torch.testing.assert_close(dense.sum(1), torch.ones(len(chosen.keep)))
    assert ((dense > 0).sum(0)[crops.patch_rows] == 1).all()
