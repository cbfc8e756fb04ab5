"""Baseline: merge random patch tokens into their most similar ones, a number per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..selection import EncoderMerge
from ..tokens import EncoderTokens
from .common.matching import join
from .merging import ScheduledMerging
from .registry import register


@register(
    "random_merge",
    summary="Baseline: in every layer random patch tokens join the most similar ones of the others.",
    stages=("encoder", "projector"),
    budget_means="encoder",
    baseline=True,
)
@dataclass
class RandomMerge(ScheduledMerging):
    """Random sources, each merged into its most similar token of the others; means weighted by sizes.

    Args:
        seed: of the choice, which depends on the layer and on the lengths alone.
    """

    seed: int = 0

    def most(self, patches: int) -> int:
        return max(0, patches - 1)

    def merge_in_encoder(self, tokens: EncoderTokens) -> EncoderMerge | None:
        assert tokens.keys is not None
        rows, n, _ = tokens.hidden_states.shape
        device, p = tokens.hidden_states.device, tokens.prefix
        generator = torch.Generator().manual_seed((self.seed * 1000 + tokens.layer) % 2**63)
        order = torch.rand(rows, n - p, generator=generator).argsort(1).to(device) + p
        sources, rest = order.split([tokens.plan[tokens.layer], n - p - tokens.plan[tokens.layer]], 1)
        targets = rest.sort(dim=1).values
        first = torch.arange(p, device=device).expand(rows, -1)
        keep = torch.cat([first, targets], 1)
        return EncoderMerge.weighted(keep, join(tokens.keys(), sources, targets, keep), tokens.sizes)
