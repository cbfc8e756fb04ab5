"""CDPruner: a diverse subset of the tokens that matter to the prompt, as greedy MAP of a DPP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import greedy_map
from ..selection import Selection
from ..tokens import Needs, TowerInfo, VisualTokens
from .base import Strategy
from .common.grouping import rows_per_segment, unit
from .registry import register


@register(
    "cdpruner",
    summary="Keep a diverse subset relevant to the prompt: greedy MAP of a relevance-conditioned DPP.",
    stages=("projector",),
    paper="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs, "
    "arXiv 2506.10967",
    code="github.com/Theia-4869/CDPruner",
    code_licence="Apache-2.0",
    differs="Relevance compares projected features with the LLM's own embeddings of the prompt's text "
    "tokens, template included: the public code for LLaVA loads CLIP's text tower and its visual "
    "projection, which a patched model does not have, and negates that similarity (negate=True). Relevance "
    "is scaled per image or crop, not over a batch; cells that the model unpads do not compete.",
)
@dataclass
class CDPruner(Strategy):
    """Conditional diversity maximisation (arXiv 2506.10967).

    The relevance of a token is its mean cosine with the embeddings of the prompt's text tokens, scaled to `r
    = (rel - min + 1e-6) / (max - min)`. With the cosine similarity `S` of the features, the kernel is `L_ij =
    r_i S_ij r_j`, and tokens are added greedily so that each multiplies `det(L)` of the chosen ones most
    (incremental Cholesky, arXiv 1709.05135). Every image, crop or frame keeps its part of the budget; without
    text all tokens are equally relevant.

    Args:
        theta: weight of relevance in [0, 1): quality becomes `exp(theta / (2 (1 - theta)) r)`. None uses `r`
            itself, as the public code does; 0 ignores the text.
        negate: count dissimilar tokens as relevant, as the public code does with CLIP features.
        keep_newline: keep image-newline rows on top of the budget, as the public code does.
    """

    theta: float | None = None
    negate: bool = False
    keep_newline: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"theta must be None or lie in [0, 1), found {self.theta}.")

    def needs(self, tower: TowerInfo | None) -> Needs:
        return Needs(text_embeddings=True)

    def select(self, tokens: VisualTokens) -> Selection:
        relevance = self._relevance(tokens)
        kept = [tokens.separator_rows] if self.keep_newline else []
        for rows, count in zip(rows_per_segment(tokens), self.counts(tokens.segments), strict=True):
            if len(rows):
                quality, x = self._quality(relevance[rows]), tokens.features[rows].float()
                picks = greedy_map(x[None], quality[None], min(count, len(rows)))[0]
                kept.append(rows[picks])
        return Selection(torch.cat(kept).sort().values)

    def _relevance(self, tokens: VisualTokens) -> Tensor:
        """(n,) float32: mean cosine with the text tokens."""
        text = tokens.text_embeddings
        if text is None or not len(text):
            return torch.zeros(len(tokens), device=tokens.cells.device)
        cosine = unit(tokens.features) @ unit(text).mean(0)
        return -cosine if self.negate else cosine

    def _quality(self, relevance: Tensor) -> Tensor:
        above, spread = relevance - relevance.min(), relevance.max() - relevance.min()
        scaled = torch.where(spread > 0, (above + 1e-6) / spread, torch.ones_like(relevance))
        return scaled if self.theta is None else torch.exp(self.theta / (2 * (1 - self.theta)) * scaled)
