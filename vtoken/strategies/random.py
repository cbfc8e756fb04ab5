"""Baseline: keep a random subset."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..tokens import Selection, VisualTokens
from .base import Strategy
from .registry import register


@register(
    "random",
    summary="Keep a seeded random subset of the patches of every segment.",
    stages=("projector",),
    baseline=True,
)
@dataclass
class Random(Strategy):
    """Keep `budget` of the patches of every image, crop or frame, drawn without replacement.

    The draw depends on the seed and on the grids alone: the same picture shape gives the same places, on any device and
    in any batch. Separator rows (image-newline) are dropped.

    Args:
        seed: seed of the generator.
    """

    seed: int = 0

    def select(self, tokens: VisualTokens) -> Selection:
        generator = torch.Generator().manual_seed(self.seed)
        segment_of = tokens.segment_of.cpu()
        kept = []
        for i, count in enumerate(self.counts(tokens.segments)):
            rows = (segment_of == i).nonzero()[:, 0]
            kept.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
        return Selection(torch.cat(kept).sort().values.to(tokens.cells.device))
