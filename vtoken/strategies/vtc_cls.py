"""VTC-CLS: rank by CLS attention averaged over the last tower layers."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from ..tokens import Needs, TowerInfo, VisualTokens
from .common.scores import Score, attention_needs, attention_scores
from .registry import register
from .scored import ScoredStrategy


@register(
    "vtc_cls",
    summary="Keep the tokens with the highest CLS attention, averaged over heads and the last tower layers.",
    stages=("projector",),
    paper="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs, arXiv 2412.05819",
    code="github.com/THU-MIG/VTC-CLS",
    code_licence="Apache-2.0",
    differs="Works on batches (the public code averages over the batch); crops of anyres images keep a "
    "share each.",
)
@dataclass
class VTCCLS(ScoredStrategy):
    """Visual token compression by the [CLS] token (arXiv 2412.05819).

    The score of a patch is the softmaxed attention of the CLS query, averaged over heads, combined over the
    `layers` tower layers that end with the one that makes the features. Each image, crop or frame keeps its
    `budget` highest; of a crop that is partly padding the share of what is not.

    Args:
        layers: number of ensembled layers K.
        start_layer: first ensembled layer (0-based), instead of `layers`; as the public code states it.
        ensemble: "mean", "max" or "min" over the layers.
        score: "cls", or "received" for towers without a CLS token; an extension.
    """

    layers: int = 3
    start_layer: int | None = None
    ensemble: Literal["mean", "max", "min"] = "mean"
    score: Score = "cls"
    _: KW_ONLY
    keep_newline: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers must be a whole number of at least 1, found {self.layers!r}.")
        if self.start_layer is not None and self.start_layer < 0:
            raise ValueError(f"start_layer must be a 0-based layer index, found {self.start_layer}.")

    def _layers(self, tower: TowerInfo) -> tuple[int, ...]:
        return tower.layers_up_to_feature(self.layers, self.start_layer)

    def needs(self, tower: TowerInfo | None) -> Needs:
        return attention_needs(self.score, (0,) if tower is None else self._layers(tower))

    def scores(self, tokens: VisualTokens) -> Tensor:
        assert tokens.tower is not None
        layers = torch.stack([attention_scores(tokens, self.score, i) for i in self._layers(tokens.tower)])
        return layers.mean(0) if self.ensemble == "mean" else getattr(torch, "a" + self.ensemble)(layers, 0)
