"""HiRED: budget over the crops by early CLS attention, tokens inside a crop by late CLS attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from ..tokens import Needs, Segment, TowerInfo, VisualTokens
from .base import top_k
from .common.scores import Score, attention_needs, attention_scores
from .registry import register
from .scored import ScoredStrategy


@register(
    "hired",
    summary="Divide the budget over anyres crops by early CLS attention, keep the tokens with the highest "
    "late CLS attention.",
    stages=("projector",),
    paper="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution VLMs, arXiv "
    "2408.10945",
    code="github.com/hasanar1f/HiRED",
    code_licence="MIT",
    differs="Crops get their true block of the thumbnail (allocation='paper'); the public code counts "
    "consecutive raster chunks (allocation='code') and mis-stitches non-square canvases, which is not "
    "reproduced.",
)
@dataclass
class HiRED(ScoredStrategy):
    """High-Resolution Early Dropping (arXiv 2408.10945).

    `T = int(budget * cells)` tokens of an image are divided: `int(T * alpha)` for the thumbnail, the rest
    over the crops in proportion to the attention that the CLS token of the thumbnail pays to each crop's
    region in the first tower layer. Inside each segment the tokens with the highest CLS attention, summed
    over heads, in the layer that makes the features are kept. An image with one segment (LLaVA-1.5) and a
    video only have the second step. The cells of padding count, and what is chosen among them is lost, as in
    the paper; cells of a canvas that the model shrinks (LLaVA-OneVision) do not.

    Args:
        alpha: share of the budget for the thumbnail.
        allocation: "paper" weighs a crop by the summed attention in its region, "code" by the number of
            top-ranked thumbnail tokens in a consecutive chunk, as the public code does.
        keep_newline: keep image-newline rows on top of the budget; the public code drops them.
        mask_padding: never choose cells that lie in the padding of the canvas; the method itself may lose
            them.
        score: "cls", or "received" (attention received by each token) for towers without a CLS token; an
            extension.
    """

    alpha: float = 0.5
    allocation: Literal["paper", "code"] = "paper"
    _: KW_ONLY
    mask_padding: bool = False
    score: Score = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], found {self.alpha}.")

    def needs(self, tower: TowerInfo | None) -> Needs:
        if tower is None:
            return attention_needs(self.score, (0,))
        return attention_needs(self.score, (tower.first_global_layer, tower.layers_up_to_feature(1)[0]))

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens per segment at even attention; their sum is that of `select`, up to rounding and padding."""
        total = self._total(segments, budget)
        if segments[0].kind != "thumbnail":
            return self._evenly(segments, total)
        return self._divide(self._sizes(segments), total, torch.ones(len(segments) - 1, dtype=torch.float64))

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int | None:
        padded = not self._skips_unfed(segments) and any(s.fed < s.size for s in segments)
        return (
            None if padded or segments[0].kind == "thumbnail" else super()._total_kept(segments, separators)
        )

    def ceiling(self, segments: Sequence[Segment], separators: int = 0) -> int:
        """The most that `select` keeps, of crops also where attention is uneven and rounding takes less."""
        if segments[0].kind != "thumbnail":
            return super().ceiling(segments, separators)
        sizes, total = self._sizes(segments), self._total(segments)
        full = min(int(total * self.alpha), sizes[0])
        most = max(1, full + min(total - full, sum(sizes[1:])))
        return most + (separators if self.keep_newline else 0)

    def scores(self, tokens: VisualTokens) -> tuple[Tensor, list[int]]:
        assert tokens.tower is not None
        segments = tokens.segments
        late = attention_scores(tokens, self.score, tokens.tower.layers_up_to_feature(1)[0])
        total = self._total(segments)
        if segments[0].kind == "thumbnail":
            early = attention_scores(tokens, self.score, tokens.tower.first_global_layer)[0]
            counts = self._divide(self._sizes(segments), total, self._region_weights(early, segments))
        else:
            counts = self._evenly(segments, total)
        if self._skips_unfed(segments) or all(s.fed == s.size for s in segments):
            return late, counts
        fed = tokens.fed_cells.view(late.shape)
        counts = torch.stack([fed[i, top_k(row, counts[i])].sum() for i, row in enumerate(late)]).tolist()
        # an image keeps at least one token, also if all that was chosen is padding
        return late, counts if any(counts) else [1] + counts[1:]

    def _skips_unfed(self, segments: Sequence[Segment]) -> bool:
        """Whether cells without a token are never chosen. Where a canvas is shrunk most cells have none."""
        return self.mask_padding or any(s.shrink > 1 for s in segments)

    def _sizes(self, segments: Sequence[Segment]) -> list[int]:
        return [s.fed if self._skips_unfed(segments) else s.size for s in segments]

    def _total(self, segments: Sequence[Segment], budget: float | int | None = None) -> int:
        cells = sum(s.fed if any(s.shrink > 1 for s in segments) else s.size for s in segments)
        return self.allowance(budget).total(segments, cells)

    def _evenly(self, segments: Sequence[Segment], total: int) -> list[int]:
        """Frames of a video, or a single image: no thumbnail to consult."""
        return [min(s.fed, max(1, total // len(segments))) for s in segments]

    def _divide(self, sizes: list[int], total: int, weights: Tensor) -> list[int]:
        full = min(int(total * self.alpha), sizes[0])
        rest = min(total - full, sum(sizes[1:]))
        if float(weights.sum()) == 0:
            weights = torch.ones_like(weights)
        if self.allocation == "code":
            w = [int(x) for x in weights]
            crops = [rest * x // sum(w) for x in w]
        else:
            # a share that is whole on paper may come out of float64 a hair below
            crops = [int(x + 1e-9) for x in (rest * weights / weights.sum()).tolist()]
        counts = [full, *(min(n, c) for n, c in zip(sizes[1:], crops, strict=True))]
        return counts if sum(counts) else [1] + counts[1:]

    def _region_weights(self, early: Tensor, segments: Sequence[Segment]) -> Tensor:
        """(crops,) float64: how much the CLS token looks at each crop's part of the thumbnail."""
        height, width = segments[0].grid
        if self.allocation == "code":
            marks = torch.zeros(len(early), dtype=torch.float64, device=early.device)
            marks[top_k(early, int(len(early) * (1 - self.alpha)))] = 1
            crops = len(segments) - 1
            return torch.stack(
                [chunk.sum() for chunk in marks[: len(marks) // crops * crops].chunk(crops)]
            ).cpu()
        rows = max(s.place[0] for s in segments[1:]) + 1
        columns = max(s.place[1] for s in segments[1:]) + 1
        y = torch.arange(height, device=early.device) * rows // height
        x = torch.arange(width, device=early.device) * columns // width
        block = (y[:, None] * columns + x[None]).flatten()
        sums = torch.zeros(rows * columns, dtype=torch.float64, device=early.device)
        sums.index_add_(0, block, early.double())
        return torch.stack([sums[s.place[0] * columns + s.place[1]] for s in segments[1:]]).cpu()
