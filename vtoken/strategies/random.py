"""Baseline: keep a random subset."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tokens import VisualTokens
from .registry import register
from .scored import ScoredStrategy


@register(
    "random",
    summary="Keep a seeded random subset of the patches of every segment.",
    stages=("projector",),
    baseline=True,
)
@dataclass
class Random(ScoredStrategy):
    """Keep `budget` of the patches of every image, crop or frame, drawn without replacement.

    The draw depends on the seed and on the grids alone: the same picture shape gives the same places, on any
    device and in any batch.

    Args:
        seed: seed of the generator.
    """

    seed: int = 0

    def scores(self, tokens: VisualTokens) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        segment_of, scores = tokens.segment_of.cpu(), torch.zeros(len(tokens))
        for i in range(len(tokens.segments)):
            rows = (segment_of == i).nonzero()[:, 0]
            scores[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(0.0, -len(rows), -1)
        return tokens.by_cell(scores.to(tokens.cells.device))
