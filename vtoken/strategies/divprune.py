"""DivPrune: the subset whose nearest members lie as far apart as a greedy search can make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels import farthest_point
from ..selection import Selection
from ..tokens import Segment, VisualTokens
from .base import Strategy
from .budgets import divide
from .registry import register


@register(
    "divprune",
    summary="Keep the tokens that differ most from each other: greedy max-min selection by cosine distance.",
    stages=("projector",),
    paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, arXiv 2503.02175",
    code="github.com/vbdi/divprune",
    code_licence="CC BY-NC 4.0; written from the paper, nothing is taken from it",
    differs="Distances are computed in float32 (the public code uses the model's dtype); chosen tokens "
    "leave the candidates, so that none is kept twice; several images of a prompt are pruned one by one, a "
    "video as a whole.",
)
@dataclass
class DivPrune(Strategy):
    """Max-min diversity selection (arXiv 2503.02175).

    The distance of two tokens is `1 - cos(x_i, x_j)` of their projected features. The first token is the one
    whose nearest other token is farthest; each next one maximises the distance to its nearest chosen token,
    until `round(budget * n)` are chosen, halves rounded to even. All tokens of an image or a video compete,
    crops, frames and image-newline rows alike: newline rows are equal vectors, so that hardly more than one
    of them survives.

    Args:
        protect_newline: keep every image-newline row on top of the budget, which then counts patches; an
            extension.
    """

    protect_newline: bool = False
    segments_compete = True

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int:
        on_top = separators if self.protect_newline else 0
        fed = sum(s.fed for s in segments)
        return self.allowance().nearest(segments, fed + separators - on_top) + on_top

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Patches kept per segment if all are equally diverse; the sum is exact without separator rows."""
        fed = [s.fed for s in segments]
        return divide(self.allowance(budget).nearest(segments, sum(fed)), fed)

    def select(self, tokens: VisualTokens) -> Selection:
        device = tokens.cells.device
        candidates = tokens.patch_rows if self.protect_newline else torch.arange(len(tokens), device=device)
        count = self.allowance().nearest(tokens.segments, len(candidates))
        chosen = candidates[farthest_point(tokens.features[candidates][None].float(), count)[0]]
        if self.protect_newline:
            chosen = torch.cat([chosen, tokens.separator_rows])
        return Selection(chosen.sort().values)
