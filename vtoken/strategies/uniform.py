"""Baseline: keep every n-th token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..selection import Selection
from ..tokens import VisualTokens
from .base import Strategy
from .registry import register


@register(
    "uniform",
    summary="Keep evenly spaced patches of every segment, in raster order.",
    stages=("projector",),
    baseline=True,
)
@dataclass
class Uniform(Strategy):
    """Keep `budget` of the patches of every image, crop or frame, evenly spaced in raster order.

    Token j of k kept among the n of a segment is the one at `floor((j + 0.5) * n / k)`. Separator rows
    (image-newline) are dropped. Where the distance is a multiple of a grid's width, the kept patches are
    columns: 0.1 of a grid of 10 x 10 is one.
    """

    def select(self, tokens: VisualTokens) -> Selection:
        segment_of = tokens.segment_of
        kept = []
        for i, count in enumerate(self.counts(tokens.segments)):
            rows = (segment_of == i).nonzero()[:, 0]
            count = min(count, len(rows))
            kept.append(
                rows[
                    torch.tensor(
                        [(2 * j + 1) * len(rows) // (2 * count) for j in range(count)], dtype=torch.long
                    )
                ]
            )
        return Selection(torch.cat(kept).sort().values)  # the rows of neighbouring crops interleave
