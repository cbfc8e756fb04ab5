"""HiPrune: anchors of a middle tower layer, their neighbours, and the most attended tokens of the last."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..tokens import Needs, Segment, TowerInfo, VisualTokens
from .base import top_k
from .common.grouping import local_cells, rows_per_segment
from .common.scores import attention_needs, attention_scores
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
    "neighbours fit the budget, which the public code does not ensure. The middle layer is published for "
    "towers of 24 and 32 layers; in others it has the same relative depth. Crops of anyres images keep a "
    "share each.",
)
@dataclass
class HiPrune(ScoredStrategy):
    """Hierarchical attention (arXiv 2508.00553).

    Attention received by a patch is the mean over heads and queries. Of the K tokens that a segment keeps,
    `round(K * alpha / 5)` are anchors, the highest in the object layer; their four neighbours stay with them.
    The other places go to the tokens with the highest attention in the layer that makes the features.

    Args:
        alpha: share of the budget for anchors with their neighbours; 0 ranks by the last layer alone.
        object_layer: tower layer of the anchors, 0-based; None for the one at three eighths of a tower with a
            CLS token (the 9th of 24), at the half of others (the 16th of 32).
        neighbours: "grid", or "sequence" as the public code.

    Raises:
        ValueError: for a share outside of [0, 1] or a negative layer.
    """

    alpha: float = 0.1
    object_layer: int | None = None
    neighbours: Literal["grid", "sequence"] = "grid"
    _: KW_ONLY
    keep_newline: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be a share in [0, 1], found {self.alpha}.")
        if self.object_layer is not None and self.object_layer < 0:
            raise ValueError(f"object_layer must be a 0-based layer index, found {self.object_layer}.")

    def _layers(self, tower: TowerInfo | None) -> tuple[int, int]:
        """The object layer, or the nearest one that attends to the whole picture, and the feature layer."""
        if tower is None:
            return 0, 0
        depth = 3 / 8 if tower.has_cls else 1 / 2
        wanted = (
            max(0, round(depth * tower.num_layers) - 1) if self.object_layer is None else self.object_layer
        )
        deep = tower.layers_up_to_feature(1)[0]
        return min(tower.global_layers, key=lambda layer: (abs(layer - wanted), layer)), deep

    def needs(self, tower: TowerInfo | None) -> Needs:
        return replace(attention_needs("received", self._layers(tower)), grid=True)

    def scores(self, tokens: VisualTokens) -> Tensor:
        middle, deep = self._layers(tokens.tower)
        objects = attention_scores(tokens, "received", middle)
        scores = attention_scores(tokens, "received", deep).clone()
        rows = rows_per_segment(tokens)
        counts = self.counts(tokens.segments)
        for i, (cells, count) in enumerate(zip(local_cells(tokens, rows), counts, strict=True)):
            anchors = cells[top_k(objects[i, cells], min(round(count * self.alpha / 5), count // 5))]
            scores[i, self._around(anchors, tokens.segments[i])] = torch.inf
        return scores

    def _around(self, anchors: Tensor, segment: Segment) -> Tensor:
        """Cells of a segment: the anchors and their neighbours, some of them twice."""
        (height, width), last = segment.grid, segment.size - 1
        if self.neighbours == "sequence":
            steps = anchors.new_tensor([0, -1, 1, -width, width])
            return (anchors[:, None] + steps).clamp(0, last).flatten()
        steps = anchors.new_tensor([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]])
        places = torch.stack([anchors // width, anchors % width], 1)[:, None] + steps
        inside = ((places >= 0) & (places < anchors.new_tensor([height, width]))).all(-1)
        return (places[..., 0] * width + places[..., 1])[inside]
