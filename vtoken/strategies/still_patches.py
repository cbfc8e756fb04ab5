"""Patches that did not change since they were computed last do not enter the vision tower."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..streams import PixelReuse
from ..tokens import TowerInfo
from .base import Strategy
from .registry import register


@register(
    "still_patches",
    summary="Skip the patches of a frame whose pixels hardly changed, before the vision tower.",
    stages=("pixels",),
    paper="Don't Look Twice: Faster Video Transformers with Run-Length Tokenization, arXiv 2411.05222",
    code="github.com/rccchoudhury/rlt",
    code_licence="MIT",
    differs="Takes the idea of comparing patches on their pixels, and leaves the rest: a place is compared "
    "with the frame in which it was computed last, not with the frame before; a skipped token is not dropped "
    "but keeps its output, keys and values; the places around a changed one are computed too (`margin`); no "
    "model is trained and no run length encoded.",
)
@dataclass
class StillPatches(Strategy):
    """Reuse of places that the pixels show unchanged, in the frames of videos and streams.

    A place of a frame is a patch, or the patches that the tower merges into one cell (Qwen-VL: 2 x 2 patches
    of two sampled frames). It changed if the mean absolute difference of its pixels, over all channels, from
    those with which it was computed last is larger than `threshold`. Changed places and those within `margin`
    of them are computed; the others pass no layer: their keys, values and outputs stay. A frame without a
    change costs no layer, and equal frames give exactly the features of one. Where a part of a frame changed,
    the outputs of the others still hold what they saw of the earlier picture, which is not exact. The LLM
    reads as many visual tokens as before: there is no budget, and a strategy combined with this one has it
    alone. Images outside of a `vtoken.stream` are computed in full.

    Args:
        threshold: largest difference of an unchanged place, at least 0, in units of the normalised pixels:
            0.05 is 6 of 255 levels where a processor divides by 0.5 (SigLIP, Qwen3-VL), and 3.4 levels where
            it divides by 0.27 (CLIP, Qwen2-VL, Qwen2.5-VL).
        margin: places in each direction around a changed one that are computed with it.
        refresh: frames from one that is computed in full to the next; None: the first alone, 1: all.
    """

    budget: float | int | None = field(default=None, init=False)  # type: ignore[assignment]
    threshold: float = 0.05
    _: KW_ONLY
    margin: int = 1
    refresh: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold must be a finite number, at least 0, found {self.threshold!r}.")
        if self.margin < 0:
            raise ValueError(f"margin must be a number of places, at least 0, found {self.margin!r}.")
        if self.refresh is not None and self.refresh < 1:
            raise ValueError(
                f"refresh must be a number of frames, at least 1, or None, found {self.refresh!r}."
            )

    @property
    def is_identity(self) -> bool:
        return self.refresh == 1

    def reuse(self, tower: TowerInfo) -> PixelReuse:
        return PixelReuse(math.inf if self.refresh is None else self.refresh, self.origins)

    def origins(self, pixels: Tensor, reference: Tensor | None) -> Tensor:
        """(rows, columns) int64, see `PixelReuse`: every place itself or its earlier state."""
        own = torch.arange(pixels[:, :, 0, 0].numel(), device=pixels.device).view(pixels.shape[:2])
        return own if reference is None else own.where(self.changed(pixels, reference), PixelReuse.EARLIER)

    def changed(self, pixels: Tensor, reference: Tensor) -> Tensor:
        """(rows, columns) bool: the places to compute, of pixels (rows, columns, patches, values)."""
        wide = torch.promote_types(pixels.dtype, torch.float32)
        still = (pixels.to(wide) - reference.to(wide)).abs().mean((2, 3)) <= self.threshold
        moved = ~still  # also where a pixel is no number
        reach = min(self.margin, max(moved.shape))
        return F.max_pool2d(moved[None].float(), 2 * reach + 1, 1, reach)[0] > 0
