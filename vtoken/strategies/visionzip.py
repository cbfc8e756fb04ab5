"""VisionZip: the most attended tokens stay, the others are merged into a few evenly spaced ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..selection import Selection
from ..tokens import Needs, TowerInfo, VisualTokens
from .base import Strategy, top_k
from .common.grouping import Layout, in_order, local_cells, nearest, rows_per_segment
from .common.scores import AnyScore, attention_needs, attention_scores, score_of
from .registry import register


@register(
    "visionzip",
    summary="Keep the most attended tokens, merge the rest by key similarity into evenly spaced contextual "
    "tokens.",
    stages=("projector",),
    paper="VisionZip: Longer is Better but Not Necessary in Vision Language Models, arXiv 2412.04467",
    code="github.com/dvlab-research/VisionZip",
    code_licence="Apache-2.0",
    differs="Merges after the projector, as the public code does for Qwen2.5-VL; its LLaVA code merges "
    "before it and keeps the CLS token, for which one more dominant patch stays here. Contextual tokens "
    "sit at their target's place (layout='reference' puts them last, as the LLaVA code does); cells that "
    "the model unpads are not merged.",
)
@dataclass
class VisionZip(Strategy):
    """Dominant and contextual tokens (arXiv 2412.04467).

    In the layer that makes the features, a patch scores the attention that the CLS token pays it, averaged
    over heads. Of the `total` tokens of an image, crop or frame, `contextual` (10 of 64, at least 1) are kept
    for merging, the others are the highest scoring patches as they are. Among the m patches left, every `m //
    contextual`-th is a target; each other one joins the target with the highest cosine of attention keys
    (mean over heads), and a target becomes `x_target + mean of those that joined`.

    Args:
        contextual: contextual tokens of each image, crop or frame, instead of 10 of 64.
        merge: "sum" as the public code does, or "mean" over the target and those that joined.
        score: "cls", "received" (attention received by each patch, the public code's rule for Qwen2.5-VL), or
            "auto" by the tower.
        layout: "spatial", or "reference": contextual tokens after the dominant ones, those of all crops
            last; combine it with positions="renumber".
        keep_newline: keep image-newline rows on top of the budget; the public code drops them.
    """

    contextual: int | None = None
    merge: Literal["sum", "mean"] = "sum"
    score: AnyScore = "auto"
    layout: Layout = "spatial"
    keep_newline: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contextual is not None and self.contextual < 0:
            raise ValueError(f"contextual must be None or a number of tokens, found {self.contextual!r}.")

    def needs(self, tower: TowerInfo | None) -> Needs:
        layers = (0,) if tower is None else tower.layers_up_to_feature(1)
        return replace(attention_needs(score_of(self.score, tower), layers), keys=layers)

    def split(self, total: int) -> tuple[int, int]:
        """Dominant and contextual tokens among `total`."""
        contextual = max(1, total * 10 // 64) if self.contextual is None else self.contextual
        contextual = min(contextual, max(0, total - 1))
        return total - contextual, contextual

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.tower is not None
        n, device, layer = len(tokens), tokens.cells.device, tokens.tower.layers_up_to_feature(1)[0]
        scores = attention_scores(tokens, score_of(self.score, tokens.tower), layer)
        keys = tokens.keys(layer).float().unflatten(-1, (tokens.tower.num_heads, -1)).mean(-2)
        owner, weight = torch.full((n,), -1, device=device), torch.zeros(n, device=device)
        rows, kept, late = rows_per_segment(tokens), [], torch.zeros(n, dtype=torch.bool, device=device)
        for i, (cells, count) in enumerate(
            zip(local_cells(tokens, rows), self.counts(tokens.segments), strict=True)
        ):
            dominant, targets, others, target_of = self._zip(
                scores[i, cells], keys[i, cells], min(count, len(cells))
            )
            kept += [rows[i][dominant], rows[i][targets]]
            late[rows[i][targets]] = True
            joined = torch.bincount(target_of, minlength=len(targets))
            own = rows[i][targets[joined > 0]]
            owner[own], owner[rows[i][others]] = own, rows[i][targets][target_of]
            parts = (joined + (self.merge == "mean")).float()
            weight[own] = 1.0 if self.merge == "sum" else 1 / parts[joined > 0]
            weight[rows[i][others]] = 1 / parts[target_of]
        newlines = tokens.separator_rows if self.keep_newline else tokens.separator_rows[:0]
        selection = Selection.merge(torch.cat([*kept, newlines]).sort().values, owner, weight)
        if self.layout == "spatial":
            return selection
        # a block for the thumbnail, one for the canvas of all crops, one for each frame of a video
        blocks = [{"thumbnail": 0, "frame": i}.get(s.kind, 1) for i, s in enumerate(tokens.segments)]
        block = torch.tensor([*blocks, 1], device=device)[tokens.segment_of]
        contextual_of = tokens.segment_of.clamp(min=0) * late  # by crop, after the dominant ones
        key = (block * 2 + late) * (len(rows) + 1) + contextual_of
        return in_order(selection, key[selection.keep].argsort(stable=True), n)

    def _zip(self, scores: Tensor, keys: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Indices of dominant tokens, of targets and of the others, and the target's number of each other."""
        dominant, contextual = self.split(total)
        first = top_k(scores, dominant)
        rest = torch.ones_like(scores, dtype=torch.bool).index_fill_(0, first, False).nonzero()[:, 0]
        if not contextual or not len(rest):
            return first, rest[:0], rest[:0], rest[:0]
        step = max(1, len(rest) // contextual)
        is_target = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
        is_target[: step * contextual : step] = True
        targets, others = rest[is_target], rest[~is_target]
        return first, targets, others, nearest(keys[others], keys[targets])
