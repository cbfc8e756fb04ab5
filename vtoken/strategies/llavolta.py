"""LLaVolta's visual context compressor: average pooling of the visual tokens before one LLM layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..selection import Selection
from ..tokens import PrefillTokens, VisualTokens
from .base import Strategy
from .budgets import frames_of
from .common.grouping import mean_of_runs
from .common.schedule import check_inside, wanted
from .registry import register


@register(
    "llavolta",
    summary="Average every run of s visual tokens into one, before a layer in the middle of the LLM.",
    stages=("prefill",),
    budget_means="cut",
    paper="LLaVolta: Efficient Multi-modal Models via Stage-wise Visual Context Compression, arXiv "
    "2406.20092",
    code="github.com/Beckschen/LLaVolta",
    code_licence="Apache-2.0",
    differs="Only the pooling, which needs no training. Masks are cut by column (the public code keeps the "
    "first ones, which is wrong with padding); a mean sits at the position of its run's middle token, the "
    "floored mean of 1-D positions, which multimodal rope does not have.",
)
@dataclass
class LLaVolta(Strategy):
    """Average pooling inside the LLM (arXiv 2406.20092).

    Before layer K the tokens of every image or video, in reading order, are cut into runs of s and
    replaced by their means; a shorter run at the end is dropped, as in the public code, unless it is all
    there is. The budget is what remains after the cut: s is the smallest stride that fits it.

    Args:
        layer: K, half the LLM's depth if None (16 of 32, as published); -1 pools before the LLM.
        stride: s, instead of the one that follows from the budget.
        keep_newline: keep image-newline and separator tokens, on top of the budget.
    """

    budget: float | int = 0.0625
    layer: int | None = None
    stride: int | None = None
    keep_newline: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and self.layer < -1:
            raise ValueError(f"layer must be a 0-based LLM layer, -1 or None, found {self.layer!r}.")
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride must be a whole number of at least 1, found {self.stride!r}.")

    @property
    def is_identity(self) -> bool:
        return self.stride == 1 if self.stride is not None else super().is_identity

    @property
    def acts_on_projector(self) -> bool:
        return self.layer == -1

    def prefill_layers(self, num_layers: int, entering: float = 1.0) -> tuple[int, ...]:
        return () if self.layer == -1 else (num_layers // 2 if self.layer is None else self.layer,)

    def check_depth(self, num_layers: int, entering: float = 1.0) -> None:
        if self.layer != -1:
            check_inside(self.prefill_layers(num_layers), num_layers, self.info.name)

    def select(self, tokens: VisualTokens) -> Selection:
        allowed = self.allowance().allowed(len(tokens), frames_of(tokens.segments))
        separator, stride = tokens.cells < 0, self._stride(len(tokens), allowed)
        return mean_of_runs(torch.zeros_like(tokens.cells), separator, stride, self.keep_newline)

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        rows = tokens.visual_rows
        assert tokens.item is not None and tokens.separator is not None
        stride = self._stride(tokens.total_visual, wanted(self.budget, tokens))
        return mean_of_runs(tokens.item[rows], tokens.separator[rows], stride, self.keep_newline)

    def _stride(self, n: int, allowed: float) -> int:
        return self.stride or max(1, math.ceil(n / allowed - 1e-6))
