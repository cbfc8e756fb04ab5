"""VisPruner: the most attended tokens, and of the others those that no other token resembles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..tokens import Needs, TowerInfo, VisualTokens
from .common.grouping import TIE, local_cells, rows_per_segment, unit
from .common.scores import AnyScore, attention_needs, attention_scores, score_of
from .registry import register
from .scored import ScoredStrategy

ROUND = 8  # tokens that a round of the published code drops


@register(
    "vispruner",
    summary="Keep the tokens with the highest CLS attention, and thin the others by similarity until the "
    "budget is met.",
    stages=("projector",),
    paper="Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, "
    "arXiv 2412.01818",
    code="github.com/Theia-4869/VisPruner",
    code_licence="Apache-2.0",
    differs="Compares features after the projector, the public code before it. A round drops no more tokens "
    "than stand in even places. Crops of anyres images keep a share each.",
)
@dataclass
class VisPruner(ScoredStrategy):
    """Important and diverse tokens (arXiv 2412.01818).

    Of the K tokens that a segment keeps, `int(important * K)` are those with the highest CLS attention of the
    layer that makes the features, averaged over heads. The others stand in descending order of attention and
    are thinned in rounds: of the tokens in even places, the eight with the largest cosine to any token in an
    odd place are dropped, until K are left in all. After a round the even ones come first, by similarity.

    Args:
        important: share of the budget that attention chooses. 1.0 is FasterVLM (same authors), 0.0 thins all
            tokens.
        order: "attention", or "raster": places are counted in raster order, again after every round, as ports
            of the method do.
        score: "cls", "received" as ports do for towers without a CLS token, or "auto" by the tower.
    """

    important: float = 0.5
    order: Literal["attention", "raster"] = "attention"
    score: AnyScore = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"important must be a share in [0, 1], found {self.important}.")

    def needs(self, tower: TowerInfo | None) -> Needs:
        layers = (0,) if tower is None else tower.layers_up_to_feature(1)
        return attention_needs(score_of(self.score, tower), layers)

    def scores(self, tokens: VisualTokens) -> Tensor:
        assert tokens.tower is not None
        kind, layer = score_of(self.score, tokens.tower), tokens.tower.layers_up_to_feature(1)[0]
        scores = attention_scores(tokens, kind, layer).clone()
        rows, counts = rows_per_segment(tokens), self.counts(tokens.segments)
        for row, mine, cells, count in zip(scores, rows, local_cells(tokens, rows), counts, strict=True):
            order = row[cells].sort(descending=True, stable=True).indices
            first = int(count * self.important)
            rest = self._thinned(tokens.features[mine], order[first:], count - first)
            row[cells[torch.cat([order[:first], rest])]] = torch.inf
        return scores

    def _thinned(self, x: Tensor, rest: Tensor, count: int) -> Tensor:
        """`count` of the tokens `rest` of a segment (n, d), or all if there are fewer."""
        if not count:
            return rest[:0]
        x = unit(x)
        while len(rest) > count:
            rest = rest.sort().values if self.order == "raster" else rest
            even, odd = rest[::2], rest[1::2]
            similarity = ((x[even] @ x[odd].mT).amax(-1) / TIE).round()  # so that equal cosines tie
            drop = min(ROUND, len(rest) - count, len(even))
            rest = torch.cat([even[similarity.sort(descending=True, stable=True).indices[drop:]], odd])
        return rest
