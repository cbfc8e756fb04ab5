"""TS-LLaVA: an even sample of all frames' tokens, and the tokens of one collage of a few frames."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..selection import Selection
from ..tokens import Needs, NotProvided, Segment, TowerInfo, VisualTokens
from .base import Strategy
from .budgets import Budget
from .common.grouping import rows_per_segment
from .registry import register

FEWER = (6, 4, 2, 1)  # frames of a collage where the video has fewer than asked for


@register(
    "ts_llava",
    summary="Sample all frames' tokens evenly, and add the tokens of a collage of a few frames.",
    stages=("projector",),
    paper="TS-LLaVA: Constructing Visual Tokens through Thumbnail-and-Sampling for Training-Free Video "
    "Large Language Models, arXiv 2411.11066",
    code="github.com/tingyu215/TS-LLaVA",
    code_licence="Apache-2.0",
    differs="The budget is the sum of sample and thumbnail (0.12 of 50 frames of 576 tokens are the "
    "published 3456); where it leaves no room for both, all of it is sampled; short videos get a collage of "
    "fewer frames; one collage per video, without the ablations with several; positions='renumber' numbers "
    "the tokens as published.",
)
@dataclass
class TSLLaVA(Strategy):
    """Thumbnail and sampling (arXiv 2411.11066): training-free video for image models.

    The images of a prompt are the frames of one video.
    The tokens of all frames, one frame after the other, are sampled at `round(linspace(0, n - 1, S))`,
    across frames and rows alike. The thumbnail is a collage of evenly spaced frames, scaled down to cells of
    one picture, which passes the tower as one more frame of V tokens. `S + V` is the budget. The sample comes
    first. Of images in crops, the view of the whole image is the frame. Separator rows are dropped.

    Args:
        frames: how many of them the collage shows.
        thumbnail: whether to add it; without it the method is a uniform sample, for any model.
        thumbnail_first: whether its tokens come before the sample.
    """

    budget: float | int = 0.12
    frames: int = 6
    thumbnail: bool = True
    thumbnail_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 1:
            raise ValueError(f"frames must be a whole number, at least 1, found {self.frames!r}.")

    def needs(self, tower: TowerInfo | None) -> Needs:
        return Needs(pixels=self.thumbnail, together=True)

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Places per segment that are taken; those of a thumbnail are the last of the video."""
        kept = torch.cat(self._places(segments, self.allowance(budget)))
        fed = torch.tensor([s.fed if _is_frame(s) else 0 for s in segments])
        return torch.bincount(
            torch.searchsorted(fed.cumsum(0), kept, right=True), minlength=len(segments)
        ).tolist()

    def select(self, tokens: VisualTokens) -> Selection:
        views = [
            rows for rows, s in zip(rows_per_segment(tokens), tokens.segments, strict=True) if _is_frame(s)
        ]
        rows = torch.cat(views)
        sampled, rest = (
            rows[places.to(rows.device)] for places in self._places(tokens.segments, self.allowance())
        )
        keep = torch.cat([sampled, rest]).sort().values
        if not len(rest):
            return Selection(keep)
        if tokens.pixels is None or tokens.encode is None:
            raise NotProvided("ts_llava was given no pixels.")
        parts = [
            tokens.features[sampled],
            tokens.encode(collage(tokens.pixels, self.frames))[0].to(tokens.features),
        ]
        return Selection(keep, features=torch.cat(parts[::-1] if self.thumbnail_first else parts))

    def _places(self, segments: Sequence[Segment], budget: Budget) -> tuple[Tensor, Tensor]:
        """Indices into the tokens of all frames, ascending: the sample's, and the thumbnail's places."""
        sizes = [s.fed for s in segments if _is_frame(s)]
        n, total = sum(sizes), min(sum(sizes), budget.total(segments, sum(s.fed for s in segments)))
        view = sizes[0] if self.thumbnail and len(set(sizes)) == 1 else total
        sampled = sample_indices(n, total - view if total > view else total)
        free = torch.ones(n, dtype=torch.bool)
        free[sampled] = False
        rest = free.nonzero()[:, 0]
        count = total - len(sampled)
        return sampled, rest[:count] if self.thumbnail_first else rest[len(rest) - count :]


def _is_frame(segment: Segment) -> bool:
    return segment.kind != "crop"


def frame_indices(frames: int, count: int) -> list[int]:
    """Frames that the method reads of a video: `count` midpoints of equal stretches of `frames` frames."""
    count = min(frames, count)
    ends = [round((frames - 1) / count * i) for i in range(count + 1)]
    return [(a + b) // 2 for a, b in itertools.pairwise(ends)]


def sample_indices(n: int, count: int) -> Tensor:
    """(count,) int64: evenly spaced among n, first and last included; in float32, as the public code."""
    return torch.linspace(0, n - 1, count, dtype=torch.float32).round().long().clamp(0, n - 1)


def grid_shape(cells: int) -> tuple[int, int]:
    """(rows, columns) of a collage: the factors that differ least, rows at least as many as columns."""
    columns = max(c for c in range(1, int(cells**0.5) + 1) if cells % c == 0)
    return cells // columns, columns


def collage(pixels: Tensor, cells: int) -> Tensor:
    """One picture of evenly spaced frames, in order of time and row by row: (n, c, h, w) -> (1, c, h, w).

    Cells are `h // rows` by `w // columns`; what they leave of the picture is zero, the mean colour of
    normalised pixels.
    """
    cells = max(c for c in (cells, *FEWER) if c <= len(pixels) and c <= cells)
    chosen = pixels[sample_indices(len(pixels), cells).to(pixels.device)].float()
    (rows, columns), (height, width) = grid_shape(cells), pixels.shape[-2:]
    size = height // rows, width // columns
    if size[0] < height or size[1] < width:
        small = F.interpolate(chosen, size, mode="area")
    else:
        small = F.interpolate(chosen, size, mode="bilinear", align_corners=False)
    lines = (
        small.unflatten(0, (rows, columns))
        .permute(2, 0, 3, 1, 4)
        .reshape(pixels.shape[1], rows * size[0], -1)
    )
    padded = F.pad(lines, (0, width - lines.shape[2], 0, height - lines.shape[1]))
    return padded[None].to(pixels.dtype)
