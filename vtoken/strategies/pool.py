"""Baseline: average pooling on the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..selection import Selection
from ..tokens import Segment, VisualTokens
from .base import Strategy
from .common.grids import blocks_of, pooled_grid, window_of
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

    The pooled grid is the one with the most cells within the budget among those that keep the grid's shape
    best, so the number of tokens can lie a little below the budget. The mean sits at the position of the
    rectangle's central cell. Of a crop that is partly padding only the rest is divided. Separator rows
    (image-newline) are dropped.
    """

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens kept per segment; a crop that is partly padding may keep fewer."""
        most = self.allowance(budget).tokens(segments)
        return [math.prod(pooled_grid(s.grid, n)) if n else 0 for s, n in zip(segments, most, strict=True)]

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int | None:
        padded = any(s.fed < s.size for s in segments)
        return None if padded else super()._total_kept(segments, separators)

    def select(self, tokens: VisualTokens) -> Selection:
        device = tokens.cells.device
        fed = tokens.fed_cells
        group_of_cell, centre, groups, start = [], [], 0, 0
        for segment, most in zip(tokens.segments, self.allowance().tokens(tokens.segments), strict=True):
            down, across = window_of(fed[start : start + segment.size].view(segment.grid), segment)
            rows, columns = pooled_grid((len(down), len(across)), most) if most else (0, 0)
            (y, dy), (x, dx) = (
                blocks_of(down, rows, segment.grid[0]),
                blocks_of(across, columns, segment.grid[1]),
            )
            block = (y[:, None] * columns + x[None]).flatten() + groups
            group_of_cell.append(block if most else torch.full_like(block, -1))
            centre.append((dy[:, None] ** 2 + dx[None] ** 2).flatten())
            groups, start = groups + rows * columns, start + segment.size
        patches = tokens.patch_rows
        group = torch.full((len(tokens),), -1, device=device)
        group[patches] = torch.cat(group_of_cell)[tokens.cells[patches]]
        patches = patches[group[patches] >= 0]
        distance = torch.cat(centre)[tokens.cells[patches]]
        # the most central surviving cell of every group, the lowest row among equals
        order = torch.argsort(group[patches] * (int(distance.max()) + 1) + distance, stable=True)
        sorted_group = group[patches][order]
        first = torch.ones_like(sorted_group, dtype=torch.bool)
        first[1:] = sorted_group[1:] != sorted_group[:-1]
        centre_of = torch.full((groups,), -1, device=device)
        centre_of[sorted_group[first]] = patches[order[first]]
        owner = torch.where(group >= 0, centre_of[group.clamp(min=0)], -1)
        return Selection.merge(patches[order[first]].sort().values, owner)
