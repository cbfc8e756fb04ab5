"""Still patches: what did not change on the pixels since it was computed last passes no tower layer."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from ..streams import PixelReuse
from ..tokens import TowerInfo
from .base import Strategy
from .budgets import Budget
from .registry import register


@register(
    "still_patches",
    summary="Patches whose pixels hardly changed since they were computed last do not enter the vision tower.",
    stages=("pixels",),
)
@dataclass
class StillPatches(Strategy):
    """Still patches."""

    budget: float | int | None = field(default=None, init=False)  # type: ignore[assignment]
    threshold: float = 0.05
    _: KW_ONLY
    refresh: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold must be a finite number, at least 0, found {self.threshold!r}.")
        if self.refresh is not None and self.refresh < 1:
            raise ValueError(f"refresh must be a whole number of frames, at least 1, or None, found {self.refresh!r}.")

    @property
    def is_identity(self) -> bool:
        return self.refresh == 1

    def allowance(self, budget: float | int | None = None) -> Budget:
        """All visual tokens enter the LLM."""
        return Budget(1.0 if budget is None else budget)

    def reuse(self, tower: TowerInfo) -> PixelReuse:
        return PixelReuse(math.inf if self.refresh is None else self.refresh, self.changed)

    def changed(self, pixels: Tensor, reference: Tensor) -> Tensor:
        """(places,) bool: the places to compute."""
        wide = torch.promote_types(pixels.dtype, torch.float32)
        return (pixels.to(wide) - reference.to(wide)).abs().mean((1, 2)) > self.threshold
