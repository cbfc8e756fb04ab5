"""Baseline: average pooling on the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..tokens import Segment, Selection, VisualTokens
from .base import Strategy, check_budget, share
from .registry import register


@register(
    "pool",
    summary="Average-pool the grid of every segment to the budget.",
    stages=("projector",),
    baseline=True,
)
@dataclass
class Pool(Strategy):
    """Divide every grid into nearly equal rectangles and replace each by its mean.

    The pooled grid is the one with the most cells within the budget among those that keep the grid's shape best, so the
    number of tokens can lie a little below the budget. The mean sits at the position of the rectangle's central cell.
    Cells that the model threw away as padding do not count. Separator rows (image-newline) are dropped.
    """

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        budget = self.budget if budget is None else check_budget(budget)
        return [math.prod(pooled_grid(s.grid, share(budget, s.size))) for s in segments]

    def select(self, tokens: VisualTokens) -> Selection:
        device = tokens.cells.device
        group_of_cell, centre, groups = [], [], 0
        for segment in tokens.segments:
            (height, width), (rows, columns) = segment.grid, pooled_grid(segment.grid, share(self.budget, segment.size))
            y = torch.arange(height, device=device) * rows // height
            x = torch.arange(width, device=device) * columns // width
            group_of_cell.append((y[:, None] * columns + x[None]).flatten() + groups)
            dy = torch.arange(height, device=device) - _middle(y, rows)[y]
            dx = torch.arange(width, device=device) - _middle(x, columns)[x]
            centre.append((dy[:, None] ** 2 + dx[None] ** 2).flatten())
            groups += rows * columns
        patches = tokens.patch_rows
        group = torch.full((len(tokens),), -1, device=device)
        group[patches] = torch.cat(group_of_cell)[tokens.cells[patches]]
        distance = torch.cat(centre)[tokens.cells[patches]]
        # the most central surviving cell of every group, the lowest row among equals
        order = torch.argsort(group[patches] * (int(distance.max()) + 1) + distance, stable=True)
        sorted_group = group[patches][order]
        first = torch.ones_like(sorted_group, dtype=torch.bool)
        first[1:] = sorted_group[1:] != sorted_group[:-1]
        rows_kept, owners = patches[order[first]], sorted_group[first]
        keep, ascending = rows_kept.sort()
        slot = torch.full((groups,), -1, device=device)
        slot[owners[ascending]] = torch.arange(len(keep), device=device)
        return Selection.groups(keep, torch.where(group >= 0, slot[group.clamp(min=0)], -1))


def _middle(block: torch.Tensor, blocks: int) -> torch.Tensor:
    """First index of the middle of each run of equal block numbers."""
    size = torch.bincount(block, minlength=blocks)
    return size.cumsum(0) - size + (size - 1) // 2


def pooled_grid(grid: tuple[int, int], budget: int) -> tuple[int, int]:
    """Rows and columns of the pooled grid: as square-celled as can be, at most `budget` cells, at least 1 x 1."""
    height, width = grid
    best = (1, 1)
    ideal = math.sqrt(budget * height / width)
    for rows in {max(1, min(height, r)) for r in (math.floor(ideal), math.ceil(ideal))}:
        candidate = (rows, max(1, min(width, budget // rows)))
        if math.prod(candidate) <= budget and math.prod(candidate) > math.prod(best):
            best = candidate
    return best
