"""Baseline: the subset that covers all tokens best by similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from ..kernels import greedy_cover
from ..selection import Selection
from ..tokens import Needs, TowerInfo, VisualTokens
from .base import Strategy
from .common.grouping import cosines, rows_per_segment
from .common.tower_features import Vision, vision_features, vision_needs
from .registry import register


@register(
    "coverage",
    summary="Keep the tokens that cover all others best: greedy facility location on cosine similarity.",
    stages=("projector",),
    baseline=True,
)
@dataclass
class Coverage(Strategy):
    """Greedy facility location: SCOPE (arXiv 2510.24214) without saliency.

    With the cosines `S` of the tokens of an image, crop or frame, a token j is covered by `c_j = max(0, max
    S_ij)` over the chosen tokens i. Each step adds the token i with the largest gain `sum_j max(0, S_ij -
    c_j)`. Every image, crop or frame keeps its part of the budget. The n x n cosines of a segment are held in
    float32.

    Args:
        vision: the features that are compared: "tower", the vision tower's output for the projector (the mean
            over the patches of a token), or "projected".
        keep_newline: keep image-newline and separator rows on top of the budget.
    """

    _: KW_ONLY
    vision: Vision = "tower"
    keep_newline: bool = False

    def needs(self, tower: TowerInfo | None) -> Needs:
        compared = vision_needs(self.vision, tower)
        return replace(self.saliency_needs(tower), states=compared.states, grid=compared.grid)

    def saliency_needs(self, tower: TowerInfo | None) -> Needs:
        """Inputs of `saliency`."""
        return Needs()

    def saliency(self, tokens: VisualTokens, rows: Sequence[Tensor]) -> list[Tensor]:
        """Per segment the weights of its tokens `rows` (fed,), not negative, (fed,)."""
        return [torch.ones(len(mine), device=mine.device) for mine in rows]

    def select(self, tokens: VisualTokens) -> Selection:
        rows = rows_per_segment(tokens)
        kept = [tokens.separator_rows] if self.keep_newline else []
        parts = vision_features(tokens, self.vision), self.saliency(tokens, rows)
        for mine, x, weight, count in zip(rows, *parts, self.counts(tokens.segments), strict=True):
            if len(mine):
                picks = greedy_cover(cosines(x, x)[None], min(count, len(mine)), weight[None])[0]
                kept.append(mine[picks])
        return Selection(torch.cat(kept).sort().values)
