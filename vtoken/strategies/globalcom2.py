"""GlobalCom2: the thumbnail sets the number of kept tokens per crop and takes part in their ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..selection import Selection
from ..tokens import Needs, Segment, TowerInfo, VisualTokens
from .common.grouping import Layout, in_order, local_cells, rows_per_segment, unit
from .registry import register
from .scored import ScoredStrategy


@register(
    "globalcom2",
    summary="Give rich anyres crops more of the budget, rank their tokens by thumbnail and crop importance "
    "together.",
    stages=("projector",),
    paper="Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large "
    "Vision-Language Models, arXiv 2501.05179",
    code="github.com/xuyang-liu16/GlobalCom2",
    code_licence="Apache-2.0",
    differs="Tokens and newline rows stay where the unpatched model reads them (layout='spatial'). The "
    "public code writes a crop's kept tokens to cells numbered over its unpadded tokens, puts the thumbnail "
    "in score order and adds newlines in padded rows; layout='reference' reproduces that order with the "
    "newline rows that exist. Several images are read each with its own maps. Images without crops, which "
    "the code leaves as they are, keep the top of their own score.",
)
@dataclass
class GlobalCom2(ScoredStrategy):
    """Global Compression Commander (arXiv 2501.05179), for anyres images.

    The importance `a` of a cell is the scaled product of the CLS query with its key in the last tower layer,
    before the softmax, averaged over heads. The thumbnail keeps its `floor(N R)` most important tokens, R
    being the budget. A crop keeps the share `r_c = min(R (1 + s_c - mean(s)), 1)` of its unpadded tokens,
    with `s = softmax(S / tau)` over the crops and `S_c` the sum of the thumbnail's importance over the crop's
    region. Inside a crop tokens are ranked by `alpha * g / |g| + (1 - alpha) * a / |a|`, where `g` is the
    thumbnail's importance resized to the unpadded canvas.

    Args:
        tau: temperature of the softmax over crops.
        alpha: weight of the thumbnail's importance in a crop's ranking.
        importance: "cls", or "cosine" for `-cos(x, mean of the segment)` of the projected features, the
            published substitute for towers without a CLS token; "auto" chooses by the tower.
        layout: "spatial" or "reference", the order in which kept tokens are read; combine the latter with
            positions="renumber".
    """

    budget: float | int = 0.25
    tau: float = 10.0
    alpha: float = 0.5
    importance: Literal["auto", "cls", "cosine"] = "auto"
    layout: Layout = "spatial"
    _: KW_ONLY
    keep_newline: bool = True

    static_counts = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0:
            raise ValueError(f"tau must be above 0, found {self.tau}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], found {self.alpha}.")

    def _reads_cls(self, tower: TowerInfo | None) -> bool:
        return self.importance == "cls" or (self.importance == "auto" and tower is not None and tower.has_cls)

    def needs(self, tower: TowerInfo | None) -> Needs:
        last = (0 if tower is None else tower.global_layers[-1],)
        return Needs(cls_logits=last if self._reads_cls(tower) else (), modalities=("image",))

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens per segment if all crops are equally rich."""
        return self.allowance(budget).tokens(segments)

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int | None:
        if len(segments) > 1 and any(s.kind == "thumbnail" for s in segments):
            return None
        return self.ceiling(segments, separators)

    def scores(self, tokens: VisualTokens) -> tuple[Tensor, list[int]]:
        rows = rows_per_segment(tokens)
        local, counts = self._importance(tokens, rows), self.counts(tokens.segments)
        thumbnail = _thumbnail(tokens)
        if thumbnail is not None and len(rows) > 1:
            local, counts = self._guided(tokens, rows, local, thumbnail)
        values = torch.zeros(len(tokens), dtype=local[0].dtype, device=tokens.cells.device)
        values[torch.cat(rows)] = torch.cat(local)
        return tokens.by_cell(values), counts

    def select(self, tokens: VisualTokens) -> Selection:
        selection, thumbnail = super().select(tokens), _thumbnail(tokens)
        if self.layout == "spatial" or thumbnail is None:
            return selection
        rows = rows_per_segment(tokens)
        order = self._reference_order(tokens, rows, self._importance(tokens, rows)[thumbnail], thumbnail)
        return in_order(selection, order[selection.keep].argsort(stable=True), len(tokens))

    def _importance(self, tokens: VisualTokens, rows: list[Tensor]) -> list[Tensor]:
        """Per segment (fed,) float64."""
        if self._reads_cls(tokens.tower):
            assert tokens.tower is not None
            logits = tokens.cls_logits(tokens.tower.global_layers[-1]).double()
            return [logits[i, cells] for i, cells in enumerate(local_cells(tokens, rows))]
        views = [tokens.features[mine].float() for mine in rows]
        return [-(unit(x) * unit(x.mean(0))).sum(-1).double() for x in views]

    def _guided(
        self, tokens: VisualTokens, rows: list[Tensor], local: list[Tensor], thumbnail: int
    ) -> tuple[list[Tensor], list[int]]:
        """Scores (fed,) and number of kept tokens of every segment, from the thumbnail's importance."""
        segments, fed = tokens.segments, sum(map(len, rows))
        ratio = self.allowance().share_of(fed)
        guide = local[thumbnail].mean().repeat(segments[thumbnail].size)  # where the model dropped a patch
        guide[local_cells(tokens, rows)[thumbnail]] = local[thumbnail]
        guide = guide.view(segments[thumbnail].grid)
        crops = [i for i in range(len(rows)) if i != thumbnail]
        ratios = self._crop_ratios(guide, [segments[i].place for i in crops], ratio)
        places = canvas_places(tokens, rows)
        canvas = torch.cat([places[i] for i in crops])
        first, last = canvas.amin(0), canvas.amax(0)
        height, width = (last - first + 1).tolist()
        resized = F.interpolate(guide[None, None], (height, width), mode="bilinear", align_corners=False)[
            0, 0
        ]
        scores, counts = list(local), [max(1, _floor(len(mine) * ratio)) for mine in rows]
        for i, share in zip(crops, ratios, strict=True):
            y, x = (places[i] - first).unbind(1)
            scores[i] = self.alpha * F.normalize(resized[y, x], dim=0) + (1 - self.alpha) * F.normalize(
                local[i], dim=0
            )
            counts[i] = _floor(len(rows[i]) * share)
        return scores, counts

    def _crop_ratios(self, guide: Tensor, places: list[tuple[int, int]], ratio: float) -> list[float]:
        """Share of each crop's tokens that stays."""
        (height, width), down = guide.shape, max(y for y, _ in places) + 1
        across = max(x for _, x in places) + 1
        y = (torch.arange(height, device=guide.device) // max(height // down, 1)).clamp(max=down - 1)
        x = (torch.arange(width, device=guide.device) // max(width // across, 1)).clamp(max=across - 1)
        region = (y[:, None] * across + x[None]).flatten()
        sums = guide.new_zeros(down * across).index_add_(0, region, guide.flatten())
        richness = (sums[[r * across + c for r, c in places]] / self.tau).softmax(0)
        return (ratio * (1 + richness - richness.mean())).clamp(max=1).tolist()

    def _reference_order(
        self, tokens: VisualTokens, rows: list[Tensor], guide: Tensor, thumbnail: int
    ) -> Tensor:
        """(n,) int64 sort keys: thumbnail by falling score, then the canvas as the public code fills it."""
        segments, key = (
            tokens.segments,
            torch.empty(len(tokens), dtype=torch.long, device=tokens.cells.device),
        )
        by_score = rows[thumbnail][guide.argsort(descending=True, stable=True)]
        key[by_score] = torch.arange(-len(guide), 0, device=key.device)
        crops = [i for i in range(len(rows)) if i != thumbnail]
        height = max((segments[i].place[0] + 1) * segments[i].grid[0] for i in crops)
        width = 1 + max((segments[i].place[1] + 1) * segments[i].grid[1] for i in crops)
        filled = torch.zeros(height, dtype=torch.bool, device=key.device)
        for i in crops:
            (h, w), (down, across) = segments[i].grid, segments[i].place
            compact = torch.arange(len(rows[i]), device=key.device)
            line = down * h + compact // w
            filled[line] = True
            key[rows[i]] = line * width + across * w + compact % w
        newlines = tokens.separator_rows
        lines = (~filled).int().argsort(stable=True)[: len(newlines)].sort().values
        lines = torch.cat([lines, torch.full((len(newlines) - len(lines),), height - 1, device=key.device)])
        key[newlines] = (lines + 1) * width - 1
        return key


def _thumbnail(tokens: VisualTokens) -> int | None:
    return next((i for i, s in enumerate(tokens.segments) if s.kind == "thumbnail"), None)


def canvas_places(tokens: VisualTokens, rows: list[Tensor]) -> list[Tensor]:
    """Per segment the (row, column) of its tokens on the canvas of crops, (fed, 2) int64."""
    out = []
    for segment, cells in zip(tokens.segments, local_cells(tokens, rows), strict=True):
        (height, width), (down, across) = segment.grid, segment.place
        out.append(torch.stack([down * height + cells // width, across * width + cells % width], 1))
    return out


def _floor(x: float) -> int:
    """Truncation of a product that may come out of float64 a hair below a whole number."""
    return int(x + 1e-9)
