"""HiPrune against its definition, cell by cell."""

from __future__ import annotations

import pytest
import torch

from vtoken import TowerInfo
from vtoken.strategies import create

from .common import LAYERS, answer, image, kept_per_segment, several, top
from .test_vispruner import rows_and_cells

DEEP, MIDDLE = LAYERS - 2, 1  # three eighths of six layers: the second


def naive(tokens, counts, alpha=0.1, neighbours="grid", middle=MIDDLE):
    out = []
    for s, (rows, cells) in enumerate(rows_and_cells(tokens)):
        objects, deep = (
            tokens.provided["received_attention", layer][s].double()[cells] for layer in (middle, DEEP)
        )
        count = counts[s]
        height, width = tokens.segments[s].grid
        stays = set()
        for i in top(objects, min(round(count * alpha / 5), count // 5)):
            y, x = divmod(cells[i], width)
            near = [(y, x), (y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)]
            near = [b * width + a for b, a in near if 0 <= b < height and 0 <= a < width]
            if neighbours == "sequence":
                last = height * width - 1
                near = [min(max(cells[i] + step, 0), last) for step in (0, -1, 1, -width, width)]
            stays |= {cells.index(cell) for cell in near if cell in cells}
        others = [i for i in range(len(rows)) if i not in stays]
        left = min(count, len(rows)) - len(stays)
        assert left >= 0
        stays |= {others[i] for i in top(deep[others], left)}
        out += [rows[i] for i in stays]
    return sorted(out)


@pytest.mark.parametrize(
    "options", [{}, dict(alpha=0.5), dict(alpha=1.0), dict(alpha=1.0, neighbours="sequence"), dict(alpha=0.0)]
)
@several
@pytest.mark.parametrize("budget", [0.5, 0.2, 1, 9])
def test_equals_the_definition(tokens, options, budget):
    strategy = create("hiprune", budget=budget, **options)
    got = answer(strategy, tokens)
    assert got.keep.tolist() == naive(tokens, strategy.counts(tokens.segments), **options)
    assert kept_per_segment(tokens, got) == strategy.counts(tokens.segments)


def test_anchors_stay_with_their_neighbours():
    tokens = image(8, 8)
    for layer in (MIDDLE, DEEP):
        tokens.provided["received_attention", layer] = torch.zeros(1, 64)
    tokens.provided["received_attention", MIDDLE][0, 24] = 1.0  # the first of its row
    tokens.provided["received_attention", DEEP][0, 60] = 1.0
    assert {16, 24, 25, 32, 60} <= set(answer(create("hiprune", budget=10, alpha=0.5), tokens).keep.tolist())
    sequence = answer(create("hiprune", budget=10, alpha=0.5, neighbours="sequence"), tokens).keep.tolist()
    assert {16, 23, 24, 25, 32, 60} <= set(sequence)


def test_without_anchors_the_last_layer_ranks():
    tokens = image(8, 8)
    deep = tokens.provided["received_attention", DEEP][0]
    assert answer(create("hiprune", budget=10, alpha=0.0), tokens).keep.tolist() == top(deep, 10)


@pytest.mark.parametrize(
    ("info", "layer"),
    [
        (TowerInfo(24, 22, True, tuple(range(24))), 8),  # the published 9th
        (TowerInfo(32, 31, False, tuple(range(32))), 15),  # the published 16th
        (TowerInfo(32, 31, False, (7, 15, 23, 31)), 15),
        (TowerInfo(12, 11, False, (3, 7, 11)), 3),
    ],
)
def test_the_layer_of_the_anchors(info, layer):
    deep = info.layers_up_to_feature(1)[0]
    assert create("hiprune").needs(info).received_attention == (layer, deep)
    assert create("hiprune", object_layer=3).needs(info).received_attention[0] in (3, 7)


def test_options_that_are_none():
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], .* found \(2.0, None\)"):
        create("hiprune", alpha=2.0)
    with pytest.raises(ValueError, match=r"object_layer be 0 or more, found \(0.1, -1\)"):
        create("hiprune", object_layer=-1)
    info = TowerInfo(12, 11, False, (3, 7, 11))
    assert create("hiprune", object_layer=11).needs(info).received_attention == (11,)
    with pytest.raises(ValueError, match="object_layer must lie in 0 to 11, found 12"):
        create("hiprune", object_layer=12).needs(info)
