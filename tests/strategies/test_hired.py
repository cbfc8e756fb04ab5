"""HiRED: the properties in its description, compared with arithmetic written out here."""

from __future__ import annotations

import pytest
import torch

from vtoken.strategies import create

from .common import HEADS, LAYERS, answer, anyres, image, kept_cells, kept_per_segment, separators_kept, top

EARLY, LATE = 0, LAYERS - 2


def summed(tokens, layer, segment):
    return tokens.provided["cls_attention", layer][segment].sum(0).double()


def paper_weights(tokens, down, across):
    side = tokens.segments[0].grid[0]
    early, weights = summed(tokens, EARLY, 0), [0.0] * (down * across)
    for j in range(side * side):
        y, x = divmod(j, side)
        weights[y * down // side * across + x * across // side] += float(early[j])
    return weights


def code_weights(tokens, crops, alpha):
    early = summed(tokens, EARLY, 0)
    marks = top(early, int(len(early) * (1 - alpha)))
    chunk = len(early) // crops
    return [sum(i * chunk <= m < (i + 1) * chunk for m in marks) for i in range(crops)]


def budgets(tokens, rho, alpha, weights):
    n, crops = tokens.segments[0].size, len(tokens.segments) - 1
    total = int((crops + 1) * n * rho)
    full = min(int(total * alpha), n)
    rest = min(total - full, crops * n)
    weights = [1] * crops if sum(weights) == 0 else weights
    return [full] + [min(n, int(rest * w / sum(weights) + 1e-9)) for w in weights]


def naive(tokens, counts):
    """Cells of every segment's top scores, padding lost."""
    cells, start, have = [], 0, set(tokens.cells.tolist())
    for s, segment in enumerate(tokens.segments):
        cells += [start + i for i in top(summed(tokens, LATE, s), counts[s])]
        start += segment.size
    return [c for c in cells if c in have]


@pytest.mark.parametrize("down,across", [(2, 2), (1, 2), (3, 1), (1, 3)])
@pytest.mark.parametrize(
    "rho,alpha", [(0.2, 0.5), (0.4, 0.5), (0.15, 0.3), (0.9, 0.5), (0.3, 0.0), (0.3, 1.0)]
)
def test_budgets_and_kept_cells_of_both_allocations(down, across, rho, alpha):
    tokens = anyres(down, across, 6, seed=down)
    for allocation, weights in (
        ("paper", paper_weights(tokens, down, across)),
        ("code", code_weights(tokens, down * across, alpha)),
    ):
        counts = budgets(tokens, rho, alpha, weights)
        chosen = answer(create("hired", budget=rho, alpha=alpha, allocation=allocation), tokens)
        assert kept_per_segment(tokens, chosen) == counts
        assert sorted(kept_cells(tokens, chosen)) == sorted(naive(tokens, counts))
        assert sum(counts) <= int(tokens.num_cells * rho)
        assert separators_kept(tokens, chosen) == 0


@pytest.mark.parametrize("rho", [0.05, 0.2, 0.4, 0.99])
def test_one_segment_keeps_the_top_of_the_summed_cls_row(rho):
    tokens = image(6, 7)
    chosen = answer(create("hired", budget=rho), tokens)
    assert chosen.keep.tolist() == top(summed(tokens, LATE, 0), max(1, int(42 * rho)))


def test_scale_and_order_of_heads_do_not_matter():
    tokens, strategy = anyres(2, 2, 4), create("hired", budget=0.3)
    want = answer(strategy, tokens).keep
    for layer in range(LAYERS):
        tokens.provided["cls_attention", layer] = 3 * tokens.provided["cls_attention", layer].flip(1)
    assert torch.equal(answer(strategy, tokens).keep, want)


def test_early_attention_in_one_block_gives_its_crop_the_rest():
    tokens = anyres(2, 2, 6)
    early = torch.full((6, 6), 1e-6)
    early[:3, 3:] = 1.0  # row 0, column 1: the second crop
    tokens.provided["cls_attention", EARLY][0] = early.flatten()
    counts = kept_per_segment(tokens, answer(create("hired", budget=0.3), tokens))
    total = int(180 * 0.3)
    assert counts[0] == total // 2 and counts[2] >= total - total // 2 - 1 and sum(counts) <= total


def test_code_allocation_has_the_same_regions_where_crops_are_bands():
    tokens = anyres(3, 1, 6)
    early = torch.zeros(6, 6)
    early[2:4] = 1.0 + torch.rand(2, 6)
    tokens.provided["cls_attention", EARLY][0] = early.flatten()
    for allocation in ("paper", "code"):
        counts = kept_per_segment(
            tokens, answer(create("hired", budget=0.2, alpha=0.7, allocation=allocation), tokens)
        )
        assert counts[2] > 0 and counts[2] >= max(counts[1], counts[3])
    assert kept_per_segment(tokens, answer(create("hired", budget=0.2), tokens))[1:] == [0, 14, 0]


@pytest.mark.parametrize("down,across,top_,left", [(1, 2, 0, 1), (3, 1, 2, 0), (2, 3, 1, 0)])
def test_a_planted_token_is_found_at_its_place(down, across, top_, left):
    """The cell with the highest attention of a crop survives, and its row carries the feature planted there."""
    side = 5
    for y, x in (
        (top_, left),
        (down * side - 1 - top_, across * side - 1 - left),
        (down * side // 2, across * side // 2),
    ):
        tokens = anyres(down, across, side, top=top_, left=left)
        crop = y // side * across + x // side
        cell = side * side * (1 + crop) + y % side * side + x % side
        tokens.provided["cls_attention", EARLY][:] = 1.0  # no crop goes without
        tokens.provided["cls_attention", LATE][1 + crop, :, y % side * side + x % side] = 9.0
        row = int((tokens.cells == cell).nonzero()[0, 0])
        tokens.features[row] = 123.0
        chosen = answer(create("hired", budget=0.4), tokens)
        assert cell in kept_cells(tokens, chosen)
        assert int((tokens.features[chosen.keep] == 123.0).all(1).sum()) == 1
        width = across * side - 2 * left + 1
        assert row == side * side + (y - top_) * width + (x - left)


def test_padding_loses_what_was_chosen_there_unless_masked():
    tokens = anyres(2, 2, 4, top=3)
    tokens.provided["cls_attention", LATE][1:, :, :4] = 5.0  # upper crops: their first row is padding
    chosen = answer(create("hired", budget=0.4), tokens)
    masked = answer(create("hired", budget=0.4, mask_padding=True), tokens)
    assert len(masked.keep) > len(chosen.keep)
    assert len(chosen.keep) <= int(tokens.num_cells * 0.4)


def test_newlines_stay_on_request():
    tokens = anyres(2, 2, 4, top=1)
    chosen = answer(create("hired", budget=0.3, keep_newline=True), tokens)
    assert separators_kept(tokens, chosen) == 6  # one per row that was not unpadded


def test_nothing_to_weigh_is_divided_evenly():
    tokens = anyres(2, 2, 4)
    tokens.provided["cls_attention", EARLY][:] = 0.0
    assert kept_per_segment(tokens, answer(create("hired", budget=0.4), tokens)) == [16, 4, 4, 4, 4]


def test_other_layers_do_not_matter():
    tokens, strategy = anyres(2, 2, 4), create("hired", budget=0.3)
    want = answer(strategy, tokens).keep
    for layer in range(LAYERS):
        if layer not in (EARLY, LATE):
            tokens.provided["cls_attention", layer] = torch.rand(5, HEADS, 16)
    assert torch.equal(answer(strategy, tokens).keep, want)


def test_received_attention_on_request():
    tokens = image(4, 4, has_cls=False)
    chosen = answer(create("hired", budget=0.25, score="received"), tokens)
    assert chosen.keep.tolist() == top(tokens.provided["received_attention", LATE][0], 4)
