"""FarCover: the tokens that cover best what lies far from the mean, what the question looks at first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ..kernels import greedy_cover
from ..kernels.reference import full_precision
from ..selection import Selection
from ..tokens import Needs, Segment, TowerInfo, VisualTokens
from .base import Strategy
from .budgets import divide
from .common.grouping import unit
from .registry import register


@register("farcover", summary="Cover what lies far from the mean, the question first.", stages=("projector",))
@dataclass
class FarCover(Strategy):
    """Coverage of what lies far from the mean, a method of this project.

    With the distance `d_ij = 1 - cos(x_i, x_j)` of the projected features, the mean of all tokens counts as
    kept before anything is chosen: `near_j = 1 - cos(x_j, mean)`. Each step adds the token i with the largest
    `sum_j demand_j max(0, near_j - d_ij)`, and then `near_j = min(near_j, d_ij)`. All patches of an image or
    a video compete for one budget, crops and frames alike; rows that are no patch are dropped. For a token j
    of another frame the distance is `across d_ij + (1 - across) (1 - cos(x_j, mean))`: what moves looks alike
    in each frame, and a question may be about where it was when.

    `demand_j = 1 - relevance + relevance n p_j`: the LLM reads the prompt's text, without the picture, up to
    one of its first layers; the query of the last text token there and the keys of the n tokens as they enter
    the LLM, both without positions, give a softmax per head, and `p` is its mean over heads. Without text
    `p_j = 1 / n`. The n x n products are held in float32: 157 MB for 6,272 tokens, of a video twice.

    Args:
        relevance: the question's share in the demand, in [0, 1); 0 reads no text, for streams and servers.
        depth: the layer that looks, as a share of the LLM's layers, in [0, 1): layer 5 of 32.
        across: how much a token of a video counts for other frames, in [0, 1].
    """

    _: KW_ONLY
    relevance: float = 0.25
    depth: float = 0.15
    across: float = 0.8
    segments_compete = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.relevance < 1 and 0 <= self.depth < 1 and 0 <= self.across <= 1):
            found = f"found {self.relevance}, {self.depth}, {self.across}"
            raise ValueError(f"relevance and depth must lie in [0, 1), across in [0, 1], {found}.")

    def needs(self, tower: TowerInfo | None) -> Needs:
        return Needs(question_attention=self.depth) if self.relevance else Needs()

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens per segment if all are alike; the sum is exact."""
        fed = [s.fed for s in segments]
        return divide(self.allowance(budget).nearest(segments, sum(fed)), fed)

    def select(self, tokens: VisualTokens) -> Selection:
        rows, count = tokens.patch_rows, sum(self.counts(tokens.segments))
        nearer = nearer_than_mean(tokens.features[rows], self.demand(tokens))
        if tokens.modality == "video":
            frames = tokens.segment_of[rows]
            nearer.mul_(torch.where(frames[:, None] == frames, nearer.new_ones(()), self.across))
        return Selection(rows[greedy_cover(nearer[None], count)[0]].sort().values)

    def demand(self, tokens: VisualTokens) -> Tensor:
        """(p,) float32, above 0: the weight of each patch among those to cover, 1 on average."""
        looks, rows = tokens.question_attention, tokens.patch_rows
        if looks is None or not self.relevance:
            return torch.ones(len(rows), dtype=torch.float32, device=rows.device)
        return 1 - self.relevance + self.relevance * len(rows) * looks[:, rows].softmax(-1).mean(0)


@full_precision
def nearer_than_mean(features: Tensor, demand: Tensor) -> Tensor:
    """(n, n) float32, of features (n, d): [i, j] is `demand_j max(0, near_j - d_ij)`; demand (n,)."""
    x = unit(features)
    near = (1 - x @ unit(x.mean(0))).clamp(min=0)
    return (x @ x.mT).add_(near - 1).clamp_(min=0).mul_(demand)
