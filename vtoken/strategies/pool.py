"""Baseline: average pooling on the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..selection import Selection
from ..tokens import Needs, Segment, TowerInfo, VisualTokens
from .base import Strategy
from .common.grids import pooled_grid
from .common.pooling import pooled
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

    def needs(self, tower: TowerInfo | None) -> Needs:
        return Needs(grid=True)

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens kept per segment; a crop that is partly padding may keep fewer."""
        most = self.allowance(budget).tokens(segments)
        return [math.prod(pooled_grid(s.grid, n)) if n else 0 for s, n in zip(segments, most, strict=True)]

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int | None:
        padded = any(s.fed < s.size for s in segments)
        return None if padded else super()._total_kept(segments, separators)

    def select(self, tokens: VisualTokens) -> Selection:
        parts = pooled(tokens, self.allowance().tokens(tokens.segments))
        centres = parts.centres()
        owner = torch.where(parts.group >= 0, centres[parts.group.clamp(min=0)], -1)
        return Selection.merge(centres[centres >= 0].sort().values, owner)
