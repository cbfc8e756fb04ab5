"""TokenCorr: repetitive crops keep fewer tokens, dropped tokens are averaged into kept ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..selection import Selection
from ..tokens import Needs, Segment, TowerInfo, VisualTokens
from .base import Strategy
from .common.grouping import local_cells, nearest, rows_per_segment, unit
from .common.scores import Score, attention_needs, attention_scores
from .registry import register


@register(
    "token_corr",
    summary="Keep of every crop as many tokens as its keys are dissimilar, plus attention outliers; fold "
    "the rest into them.",
    stages=("projector",),
    paper="Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding, "
    "arXiv 2407.14439",
    code="github.com/JiuTian-VL/TokenCorrCompressor",
    code_licence="no code released",
    differs="No code and no complete description are public. Not published, and chosen here: the layers "
    "(low_layer=1, the deep one makes the features), tau=0.9, beta=0.1, kappa=1.5, rounding to nearest, "
    "ranking instead of sampling by default, the weights of the aggregation, which runs after the "
    "projector, and what becomes of the thumbnail. A number as budget is an extension. No published result "
    "can be reproduced with it.",
    experimental=True,
)
@dataclass
class TokenCorr(Strategy):
    """Token-level correlation-guided compression (arXiv 2407.14439), completed where the paper is silent.

    A token is redundant if more than `beta * N` of the N tokens of its crop have keys with a cosine above
    `tau`, in a low tower layer. With `rho` the share of tokens that are not, the crop keeps `round(rho * N)`
    (at least 1) tokens by CLS attention `a` of that layer, and all outliers of the CLS attention of the layer
    that makes the features, those above `Q3 + kappa * (Q3 - Q1)`. Every other token joins the kept one with
    the most similar key, weighted by `a`: `x_p = sum a_j x_j / sum a_j` over the group and p itself.

    Args:
        budget: None lets the content decide; a share or a whole number is an upper limit for an image or
            video, to which the crops' numbers are scaled down together.
        low_layer: tower layer of keys and sampling attention, 0-based.
        tau: cosine of keys above which tokens are similar.
        beta: share of similar tokens above which a token is redundant.
        kappa: outlier factor, of the distance between the quartiles.
        sampling: "topk" keeps the highest `a`, "multinomial" draws by `a` without replacement.
        seed: of the draw, which depends on it and on the crop's number alone.
        aggregate: fold dropped tokens into kept ones; False drops them.
        compress_thumbnail: whether the thumbnail is compressed as well; None: only under a budget.
        keep_newline: keep image-newline rows on top.
        score: "cls", or "received" for towers without a CLS token; an extension.
    """

    budget: float | int | None = None  # type: ignore[assignment]
    low_layer: int = 1
    tau: float = 0.9
    beta: float = 0.1
    kappa: float = 1.5
    sampling: Literal["topk", "multinomial"] = "topk"
    seed: int = 0
    aggregate: bool = True
    compress_thumbnail: bool | None = None
    keep_newline: bool = False
    score: Score = "cls"

    static_counts = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_layer < 0:
            raise ValueError(f"low_layer must be a 0-based layer index, found {self.low_layer}.")
        if not -1 <= self.tau <= 1 or not 0 <= self.beta <= 1 or self.kappa < 0:
            raise ValueError(
                f"tau must lie in [-1, 1], beta in [0, 1] and kappa above 0, found {self.tau}, {self.beta},"
                f" {self.kappa}."
            )

    def _layers(self, tower: TowerInfo | None) -> tuple[int, int]:
        """The low and the deep layer."""
        if tower is None:
            return 0, 0
        low = [i for i in tower.global_layers if i >= self.low_layer] or tower.global_layers[-1:]
        return low[0], tower.layers_up_to_feature(1)[0]

    def needs(self, tower: TowerInfo | None) -> Needs:
        low, deep = self._layers(tower)
        return replace(attention_needs(self.score, (low, deep)), keys=(low,))

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """The most that may be kept per segment: all without a budget."""
        if self.budget is None and budget is None:
            return [s.fed for s in segments]
        return self.allowance(budget).tokens(segments)

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.tower is not None
        n, device, (low, deep) = len(tokens), tokens.cells.device, self._layers(tokens.tower)
        near, far = (attention_scores(tokens, self.score, layer) for layer in (low, deep))
        keys = tokens.keys(low)
        rows = rows_per_segment(tokens)
        cells = local_cells(tokens, rows)
        # rank of a token among those that may stay: the smaller, the sooner it enters as the budget grows
        entry, weight = (
            torch.full((n,), torch.inf, dtype=torch.float64, device=device),
            torch.zeros(n, device=device),
        )
        for i, (segment, mine, at) in enumerate(zip(tokens.segments, rows, cells, strict=True)):
            if not len(mine):
                continue
            probability = near[i, at].float().clamp(min=1e-12)
            weight[mine] = probability / probability.sum()
            if segment.kind == "thumbnail" and not self._compresses_thumbnail:
                entry[mine] = 0.0
            else:
                entry[mine] = self._entry(weight[mine], far[i, at].float(), keys[i, at], i)
        kept = self._within_budget(tokens, entry)
        newlines = tokens.separator_rows if self.keep_newline else tokens.separator_rows[:0]
        keep = torch.cat([kept.nonzero()[:, 0], newlines]).sort().values
        if not self.aggregate:
            return Selection(keep)
        owner = torch.full((n,), -1, device=device)
        for i, (mine, at) in enumerate(zip(rows, cells, strict=True)):
            stays = kept[mine]
            if bool(stays.any()) and not bool(stays.all()):
                owner[mine[stays]] = mine[stays]
                owner[mine[~stays]] = mine[stays][nearest(keys[i, at][~stays], keys[i, at][stays])]
        grouped = owner >= 0
        total = torch.zeros(n, device=device).index_add_(0, owner[grouped], weight[grouped])
        share = torch.zeros(n, device=device)
        share[grouped] = weight[grouped] / total[owner[grouped]]
        return Selection.merge(keep, owner, share)

    @property
    def _compresses_thumbnail(self) -> bool:
        return self.budget is not None if self.compress_thumbnail is None else self.compress_thumbnail

    def density(self, keys: Tensor, chunk: int = 1024) -> float:
        """Share of the tokens (n, d) that are not redundant."""
        keys, similar = unit(keys), []
        for start in range(0, len(keys), chunk):
            cosine = keys[start : start + chunk] @ keys.mT
            cosine.diagonal(start).fill_(-2.0)
            similar.append((cosine > self.tau).sum(1))
        return float((torch.cat(similar) <= math.ceil(self.beta * len(keys))).double().mean())

    def outliers(self, attention: Tensor) -> Tensor:
        """(n,) bool, the tokens of extraordinary attention."""
        attention = attention.double()
        low, high = torch.quantile(attention, attention.new_tensor([0.25, 0.75]))
        return attention > high + self.kappa * (high - low)

    def _entry(self, probability: Tensor, deep: Tensor, keys: Tensor, segment: int) -> Tensor:
        """(n,) float64: below 0 for outliers, (0, 1] for tokens of the local branch, inf for the others."""
        n = len(probability)
        wanted = max(1, int(self.density(keys) * n + 0.5))
        preference = probability.double().log()
        # the largest of log p plus Gumbel noise are a draw without replacement
        if self.sampling == "multinomial":
            generator = torch.Generator().manual_seed((self.seed * 65_537 + segment) % 2**63)
            noise = torch.rand(n, generator=generator, dtype=torch.float64)
            preference = preference - (-noise.clamp(min=1e-300).log()).log().to(preference)
        rank = preference.sort(descending=True, stable=True).indices.argsort()
        entry = torch.where(rank < wanted, (rank + 1).double() / wanted, torch.inf)
        out = self.outliers(deep)
        if not bool(out.any()):  # no crop is left out while another has more than one token
            entry[rank == 0] = 0.0
        return torch.where(out, -deep.double(), entry)

    def _within_budget(self, tokens: VisualTokens, entry: Tensor) -> Tensor:
        """(n,) bool: the tokens that stay."""
        if self.budget is None:
            return entry < torch.inf
        limit = self.allowance().total(tokens.segments, sum(s.fed for s in tokens.segments))
        first = entry.sort(stable=True).indices[:limit]
        return (entry < torch.inf) & torch.zeros_like(entry, dtype=torch.bool).index_fill_(0, first, True)
