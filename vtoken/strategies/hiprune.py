"""HiPrune: anchors of a middle tower layer, their neighbours, and the most attended tokens of the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import Needs, Segment, TowerInfo, VisualTokens
from .base import top_k
from .common.grouping import local_cells, rows_per_segment
from .registry import register
from .scored import ScoredStrategy


@register(
    "hiprune",
    summary="Keep the tokens that a middle tower layer attends to most, with their neighbours, and fill up "
    "with those of the last layer.",
    stages=("projector",),
    paper="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models, "
    "arXiv 2508.00553",
    code="github.com/Danielement321/HiPrune",
    code_licence="MIT",
    differs="Neighbours are those on the grid; the public code takes the end of the row above for the left "
    "neighbour of a row's first token (neighbours='sequence'). Anchors are so few that they and their "
    "neighbours fit the budget, which the public code does not ensure. Crops of anyres images keep a share "
    "each.",
)
@dataclass
class HiPrune(ScoredStrategy):
    """Hierarchical attention (arXiv 2508.00553).

    Attention received by a patch is the mean over heads and queries. Of the K tokens that a segment keeps,
    `round(K * alpha / 5)` are anchors, the highest in the object layer; their four neighbours stay with them.
    The other places go to the tokens with the highest attention in the layer that makes the features.

    Args:
        alpha: share of the budget for anchors with their neighbours; 0 ranks by the last layer alone.
        object_layer: tower layer of the anchors, 0-based. None: at three eighths of a tower with a CLS token
            and at half of others; 9th of 24 and 16th of 32 are published.
        neighbours: "grid", or "sequence" as the public code.
    """

    alpha: float = 0.1
    object_layer: int | None = None
    neighbours: Literal["grid", "sequence"] = "grid"

    def __post_init__(self) -> None:
        super().__post_init__()
        found = self.alpha, self.object_layer
        if not 0 <= self.alpha <= 1 or (self.object_layer or 0) < 0:
            raise ValueError(f"alpha must lie in [0, 1], object_layer be 0 or more, found {found}.")

    def _layers(self, tower: TowerInfo) -> tuple[int, int]:
        """The object layer, or the nearest one that attends to the whole picture, and the feature layer."""
        middle = max(0, round((3 / 8 if tower.has_cls else 1 / 2) * tower.num_layers) - 1)
        wanted = middle if self.object_layer is None else self.object_layer
        if wanted >= tower.num_layers:
            raise ValueError(f"object_layer must lie in 0 to {tower.num_layers - 1}, found {wanted}.")
        return min(tower.global_layers, key=lambda i: (abs(i - wanted), i)), tower.layers_up_to_feature(1)[0]

    def needs(self, tower: TowerInfo | None) -> Needs:
        return Needs(received_attention=tuple(sorted({*self._layers(tower)})) if tower else (0,), grid=True)

    def scores(self, tokens: VisualTokens) -> Tensor:
        assert tokens.tower is not None
        objects, deep = (tokens.received_attention(layer) for layer in self._layers(tokens.tower))
        scores, cells = deep.clone(), local_cells(tokens, rows_per_segment(tokens))
        for i, (mine, count) in enumerate(zip(cells, self.counts(tokens.segments), strict=True)):
            anchors = mine[top_k(objects[i, mine], min(round(count * self.alpha / 5), count // 5))]
            scores[i, self._around(anchors, tokens.segments[i])] = torch.inf
        return scores

    def _around(self, anchors: Tensor, segment: Segment) -> Tensor:
        """Cells of a segment: the anchors and their neighbours, some of them twice."""
        (height, width), last = segment.grid, segment.size - 1
        if self.neighbours == "sequence":
            return (anchors[:, None] + anchors.new_tensor([0, -1, 1, -width, width])).clamp(0, last).flatten()
        kept = torch.zeros(segment.size, device=anchors.device).index_fill(0, anchors, 1.0)
        cross = kept.new_tensor([[[[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]]])
        return F.conv2d(kept.view(1, 1, height, width), cross, padding=1).flatten().nonzero()[:, 0]
