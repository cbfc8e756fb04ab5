"""Patches without content take what one of them computed, and do not enter the vision tower."""

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


@register("blank_patches", summary="Skip the blank patches of pages, before the tower.", stages=("pixels",))
@dataclass
class BlankPatches(Strategy):
    """Reuse of one blank place for those around it, in images and videos, a method of this project.

    A place is a patch, or the patches that the tower merges into one cell (Qwen-VL: 2 x 2 patches, of an
    image or of two sampled frames). It is blank if no pixel is farther than `threshold` from the mean of its
    channel in this place. Of the blank places of a block, those within `margin` of content left out, the one
    nearest to the block's middle is computed, and those whose means differ from its by no more than
    `threshold` pass no layer: their keys, values and outputs are its own. All other places are computed and
    attend to all tokens, the repeated ones as often as they occur. A picture without such places is computed
    as by the unpatched model.

    What is not exact: a repeated token has the position of the computed one, in learned embeddings and, in
    Qwen-VL, in the rotated key (but not in layers whose attention another strategy reads); its output is what
    that one saw in its own attention window. The LLM reads as many visual tokens as before: there is no
    budget, and a strategy combined with this one has it alone.

    Args:
        threshold: in units of the normalised pixels, at least 0: 0.1 is 13 of 255 levels where a processor
            divides by 0.5 (SigLIP, Qwen3-VL), and 7 levels where it divides by 0.27 (CLIP, Qwen2-VL,
            Qwen2.5-VL). What is printed fainter than that counts as blank.
        margin: places in each direction around content that are computed with it.
        block: rows and columns of places that share one; 1 is the unpatched model.
    """

    budget: float | int | None = field(default=None, init=False)  # type: ignore[assignment]
    threshold: float = 0.1
    _: KW_ONLY
    margin: int = 1
    block: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold must be a finite number, at least 0, found {self.threshold!r}.")
        if self.margin < 0 or self.block < 1:
            found = f"found {self.margin!r} and {self.block!r}"
            raise ValueError(f"margin and block are numbers of places, at least 0 and 1, {found}.")

    @property
    def is_identity(self) -> bool:
        return self.block == 1

    def reuse(self, tower: TowerInfo) -> PixelReuse:
        return PixelReuse(1, self.origins)

    def origins(self, pixels: Tensor, reference: Tensor | None = None) -> Tensor:
        """(rows, columns) int64, see `PixelReuse`, of RGB pixels (rows, columns, patches, values)."""
        rows, columns = pixels.shape[:2]
        wide = torch.promote_types(pixels.dtype, torch.float32)
        channels = pixels.to(wide).unflatten(-1, (3, -1))  # (rows, columns, patches, 3, values)
        base = channels[:, :, :1, :, :1]  # the mean of equal numbers is that number then
        mean = base + (channels - base).mean((2, 4), keepdim=True)
        content = ~((channels - mean).abs().amax((2, 3, 4)) <= self.threshold)  # also what is no number
        reach = min(self.margin, max(rows, columns))
        free = F.max_pool2d(content[None].float(), 2 * reach + 1, 1, reach)[0].flatten() == 0
        own = torch.arange(rows * columns, device=pixels.device)
        down, across, last = own // columns, own % columns, torch.iinfo(own.dtype).max
        size = min(self.block, max(rows, columns))
        block = down // size * columns + across // size
        away = (2 * (down % size) - size + 1) ** 2 + (2 * (across % size) - size + 1) ** 2  # from the middle
        first = (away * len(own) + own).masked_fill(~free, last)  # no two are equal
        shared = torch.full_like(own, last).scatter_reduce(0, block, first, "amin")[block] % len(own)
        flat = mean.view(-1, 3)
        return shared.where(free & ((flat - flat[shared]).abs() <= self.threshold).all(1), own).view(rows, -1)
