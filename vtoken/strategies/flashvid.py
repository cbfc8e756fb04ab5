"""FlashVID: salient and diverse tokens of every frame stay, the others merge over time and inside frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..selection import Selection
from ..tokens import Needs, PrefillTokens, Segment, TowerInfo, VisualTokens
from .base import top_k
from .common.grouping import unit
from .common.schedule import check_inside, last_count, lengths, mean_rows, wanted
from .common.trees import cluster_roots, diverse, segments_of, trees
from .registry import register
from .video import VideoStrategy


@register(
    "flashvid",
    summary="Keep attended and diverse tokens of every frame, merge the rest along chains over time and in "
    "clusters, then drop inside the LLM by the last token's attention.",
    stages=("projector", "prefill"),
    budget_means="average",
    paper="FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token "
    "Merging, arXiv 2602.08024",
    code="github.com/Fanziyang-v/FlashVID",
    code_licence="MIT",
    differs="A tree of n tokens becomes their mean; the code divides a chain of n by 2, so that a still "
    "segment grows (average='published'). As many tokens enter as the budget says, the code rounds up per "
    "frame (rounding='published'). The LLM keeps what makes the average exact (llm_keep=0.3 is the code's "
    "for 28 layers). No token is chosen or enters twice, which the code allows; clusters know no noise; "
    "float32; batches and several videos; text between frames and newline rows stay.",
)
@dataclass
class FlashVID(VideoStrategy):
    """Tree-based merging of videos (arXiv 2602.08024).

    A video of T frames of M tokens is cut into segments where successive frames' mean tokens have a cosine
    below `segment_threshold`. `b = ceil(M R expansion)` tokens of every frame enter the LLM, R being the
    budget. `ceil(alpha b)` of them are chosen one by one, each with the largest `w_j min(1 - cos(x_j, x_i))`
    over the chosen i; `w` is the attention that token j receives in the tower, times its product with the
    segment's mean token. Each other token hangs on the most similar one of the frame before, within the
    segment, if their cosine is above `merge_threshold`; a tree becomes its mean, at the place of its earliest
    token. If these are too many for the segment, they are clustered in each frame (density peaks). Before LLM
    layer K those stay to which the prompt's last token attends most in the layer before, so many that R is
    the average over all layers. In a stream every call is a video of its own.

    Args:
        expansion: what enters the LLM, in budgets; 1.0, which `StreamSession` needs, for no drop inside it.
        alpha: share of the tokens of a frame that are chosen and not merged.
        merge_threshold: cosine above which tokens of successive frames are merged; 1.0 for never.
        segment_threshold: cosine of frames below which a segment ends.
        min_segments: least number of segments, as far as there are frames; 4 in the scripts for Qwen3-VL.
        selection: weight of a token: "attn_div" is the attention alone, as in the scripts for Qwen.
        average: "true" divides a tree by its tokens, "published" by 1 plus the children of its root.
        rounding: "exact", or "published": clusters are rounded up in every frame, and a segment that could
            merge too much merges one token less than it may.
        layer: K; None for 5/7 of the LLM's depth.
        llm_keep: share that stays of the tokens before layer K, rounded up; None for what the budget leaves.
    """

    budget: float | int = 0.25
    expansion: float = 1.25
    alpha: float = 0.7
    merge_threshold: float = 0.8
    segment_threshold: float = 0.9
    min_segments: int = 8
    selection: Literal["attn_div", "attn_div_v2"] = "attn_div_v2"
    average: Literal["true", "published"] = "true"
    rounding: Literal["exact", "published"] = "exact"
    layer: int | None = None
    llm_keep: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least = dict(expansion=1, alpha=0, min_segments=1, layer=1, llm_keep=0)
        for name, low in at_least.items():
            value, high = getattr(self, name), 1 if name in ("alpha", "llm_keep") else math.inf
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], found {value!r}.")

    def needs(self, tower: TowerInfo | None) -> Needs:
        layers = (0,) if tower is None else tower.layers_up_to_feature(1)
        return replace(super().needs(tower), received_attention=layers)

    # -- before the LLM --------------------------------------------------------------------------------------
    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens per frame that enter the LLM if all frames merge equally; the sum is exact."""
        shares = [(s.fed, self.allowance(budget).share_of(s.fed)) for s in segments]
        return [min(n, max(1, math.ceil(n * share * self.expansion - 1e-9))) for n, share in shares]

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int | None:
        return super()._total_kept(segments, separators) if self.rounding == "exact" else None

    def select(self, tokens: VisualTokens) -> Selection:
        x, rows, n = self.frames(tokens).float(), tokens.patch_rows, len(tokens)
        y, count, exact = unit(x), self.counts(tokens.segments)[0], self.rounding == "exact"
        segments = segments_of(x.mean(1), self.segment_threshold, self.min_segments)
        own = math.ceil(count * self.alpha - 1e-9)
        free = ~diverse(y, self._weight(tokens, x, segments), own)
        parent, root = trees(y, free, segments, self.merge_threshold, x.shape[1] - count, exact)
        size = torch.bincount(root, minlength=len(root))
        if self.average == "published":
            size = 1 + torch.bincount(parent[parent >= 0], minlength=len(root))
        weight = 1 / size[root]
        centre, share = cluster_roots(x, root, weight, free, segments, count - own, exact)
        joins = free.flatten() & (centre >= 0)
        owner, shares = torch.full((n,), -1, device=rows.device), torch.zeros(n, device=rows.device)
        owner[rows[joins]], shares[rows[joins]] = rows[centre[joins]], (weight * share)[joins]
        stays = ~free.flatten()
        stays[centre[joins]] = True
        keep = torch.cat([rows[stays], self.newlines(tokens)])
        return Selection.merge(keep.sort().values, owner, shares)

    def _weight(self, tokens: VisualTokens, x: Tensor, segments: list[range]) -> Tensor:
        """(T, M) float32, not negative: how much the choice of a token counts."""
        (layer,) = self.needs(tokens.tower).received_attention
        attention = tokens.received_attention(layer).flatten()[tokens.cells[tokens.patch_rows]]
        attention = attention.view(x.shape[:2]).float()
        if self.selection == "attn_div":
            return attention
        means = torch.cat([x[list(s)].mean((0, 1)).expand(len(s), -1) for s in segments])
        return attention * (x @ means[..., None])[..., 0].clamp(min=0)

    # -- inside the LLM --------------------------------------------------------------------------------------
    def prefill_layers(self, num_layers: int, entering: float = 1.0) -> tuple[int, ...]:
        if self.llm_keep == 1 or (self.llm_keep is None and self.expansion == 1):
            return ()
        return (max(1, round(num_layers * 5 / 7)) if self.layer is None else self.layer,)

    def check_depth(self, num_layers: int, entering: float = 1.0) -> None:
        for layer in self.prefill_layers(num_layers):
            check_inside((layer,), num_layers, "flashvid")
            if self.llm_keep is None and self.expansion * layer > num_layers:
                raise ValueError(
                    f"flashvid reads {self.expansion} budgets in {layer} of {num_layers} layers, an average"
                    f" above 1: choose an expansion below {num_layers / layer:.2f}, or a lower layer."
                )

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        n, spans = len(tokens.visual_rows), lengths((tokens.layer,), tokens.num_layers)
        count = last_count(n, [n], wanted(self.budget, tokens), spans)
        if self.llm_keep is not None:
            count = max(1, math.ceil(self.llm_keep * n - 1e-9))
        return Selection(top_k(mean_rows(tokens, tokens.last_row).mean(0), count))
