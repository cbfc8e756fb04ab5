"""Baseline: drop the patch tokens with the smallest keys, a number per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..selection import EncoderMerge
from ..tokens import EncoderTokens
from .merging import ScheduledMerging
from .registry import register


@register(
    "prune_by_norm",
    summary="Baseline: in every layer drop the patch tokens whose attention keys have the smallest norms.",
    stages=("encoder", "projector"),
    budget_means="encoder",
    baseline=True,
)
@dataclass
class PruneByNorm(ScheduledMerging):
    """Patch tokens with the smallest L2 norm of their attention key, the mean over heads, are dropped."""

    drops: ClassVar[bool] = True

    def most(self, patches: int) -> int:
        return max(0, patches - 1)

    def encoder_plan(self, shape):  # type: ignore[no-untyped-def]
        plan = super().encoder_plan(shape)
        if isinstance(self.r, int) and self.r * shape.layers >= shape.patches:
            raise ValueError(
                f"r={self.r} in {shape.layers} layers leaves none of {shape.patches} patch tokens: use"
                f" at most r={(shape.patches - 1) // shape.layers}."
            )
        return plan

    def merge_in_encoder(self, tokens: EncoderTokens) -> EncoderMerge | None:
        assert tokens.keys is not None
        rows, n, _ = tokens.hidden_states.shape
        left = n - tokens.prefix - tokens.plan[tokens.layer]
        norms = tokens.keys()[:, tokens.prefix :].norm(dim=2)
        best = norms.sort(dim=1, descending=True, stable=True).indices[:, :left].sort(dim=1).values
        first = torch.arange(tokens.prefix, device=norms.device).expand(rows, -1)
        return EncoderMerge.drop(torch.cat([first, best + tokens.prefix], 1), n)
