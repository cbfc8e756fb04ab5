"""FastV: one cut after K layers of the LLM, by the attention that the last token pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..selection import Selection
from ..tokens import PrefillTokens
from .base import Strategy, top_k
from .common.schedule import check_inside, mean_rows, wanted
from .registry import register


@register(
    "fastv",
    summary="After K layers of the LLM keep the visual tokens to which the last token of the prompt attends "
    "most.",
    stages=("prefill",),
    budget_means="cut",
    paper="An Image is Worth 1/2 Tokens After Layer 2, arXiv 2403.06764",
    code="github.com/pkunlp-icler/FastV",
    code_licence="no licence stated",
    differs="Ranks per prompt, with the union of its images as candidates; the public code uses the first "
    "prompt's choice for the whole batch and knows one image. Padding stays masked after the cut.",
)
@dataclass
class FastV(Strategy):
    """FastV (arXiv 2403.06764).

    Layers 0 .. K-1 read all visual tokens. Before layer K they are ranked by the attention, averaged
    over heads, that layer K-1 pays to them from the last token of the prompt; `round(budget * n)` stay. The
    budget is what remains after the cut: R = 50 % of the paper is `budget=0.5`.

    Args:
        layer: K, the number of layers that read everything. 0 keeps a random subset, as the paper does where
            no attention exists yet.
        query: "last" (the public code), or "mean" over the text after the first image (closer to the paper's
            words).
        softmax: "all" keys, as published, or "visual" keys alone: every head and every asking token then
            counts equally, however little it attends to the picture; an extension that other ports use.
        seed: of the subset for `layer=0`.
    """

    budget: float | int = 0.5
    layer: int = 2
    query: Literal["last", "mean"] = "last"
    softmax: Literal["all", "visual"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 0:
            raise ValueError(f"layer must be a whole number of at least 0, found {self.layer!r}.")

    def prefill_layers(self, num_layers: int, entering: float = 1.0) -> tuple[int, ...]:
        return (self.layer,)

    def check_depth(self, num_layers: int, entering: float = 1.0) -> None:
        check_inside((self.layer,), num_layers, self.info.name)

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        n, device = len(tokens.visual_rows), tokens.visual.device
        count = min(n, max(1, round(wanted(self.budget, tokens))))
        if count == n:
            return Selection.everything(n, device)
        if self.layer == 0:
            drawn = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[:count]
            return Selection(drawn.sort().values.to(device))
        rows = tokens.last_row if self.query == "last" else tokens.text_rows
        return Selection(top_k(mean_rows(tokens, rows, self.softmax == "visual").mean(0), count))
