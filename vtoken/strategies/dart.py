"""DART: the visual tokens that repeat least what a few pivot tokens hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..selection import Selection
from ..tokens import Needs, PrefillTokens, Segment, TowerInfo, VisualTokens
from .base import Strategy
from .budgets import divide, frames_of
from .common.grouping import cosines
from .common.schedule import check_inside
from .info import BUDGET_MEANS
from .registry import register


@register(
    "dart",
    summary="Keep a few pivots with large keys, and the visual tokens that are least similar to them.",
    stages=("prefill", "projector"),
    budget_means="cut",
    paper="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, arXiv "
    "2502.11494",
    code="github.com/ZichenWen1/DART",
    code_licence="Apache-2.0",
    differs="Exactly the budget is kept; the public code keeps the image pivots and a whole number of others "
    "per pivot (kept='published': 132 for 128 of 576). Pivots choose in the order of falling norms, the "
    "public code iterates over a set. Each image of a prompt has pivots and a budget of its own.",
)
@dataclass
class DART(Strategy):
    """Duplication-aware reduction of tokens (arXiv 2502.11494).

    Before LLM layer K, the pivots of an image or video are those of its tokens, and of the text tokens after
    it, whose keys in layer K-1 have the largest L1 norms (after rotary embedding). The image pivots stay.
    Then each pivot, image pivots first, keeps those of the other visual tokens whose hidden states have the
    smallest cosine with its own, equally many each. No attention is read. A whole-number budget counts per
    image or frame; images and videos of one prompt share it evenly.

    Args:
        layer: K, the number of layers that read everything.
        image_pivots, text_pivots: numbers of pivots.
        kept: "exact" keeps `round(budget * n)` of n tokens, "published" the image pivots and per pivot
            `floor(budget * n / pivots)` others.
        normed: compare hidden states after the last norm of the LLM, as the public code does.
        stage: "projector" does the same before the LLM, with the embeddings as hidden states and as keys, and
            all text of the prompt; a budget then counts what enters the LLM.
    """

    budget: float | int = 0.2222
    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    kept: Literal["exact", "published"] = "exact"
    normed: bool = True
    stage: Literal["prefill", "projector"] = "prefill"
    segments_compete = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise ValueError(f"layer must be at least 1, found {self.layer}: use stage='projector' for 0.")
        if self.image_pivots < 1 or self.text_pivots < 0:
            found = f"{self.image_pivots} and {self.text_pivots}"
            raise ValueError(f"image_pivots must be at least 1 and text_pivots at least 0, found {found}.")

    @property
    def acts_on_projector(self) -> bool:
        return self.stage == "projector"

    def budget_counts(self) -> str:
        return BUDGET_MEANS["entrance"] if self.acts_on_projector else super().budget_counts()

    def needs(self, tower: TowerInfo | None) -> Needs:
        return Needs(text_embeddings=self.acts_on_projector)

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens per segment if all are equally alike; the sum is exact without separators."""
        fed = [s.fed for s in segments]
        total = _exact(self.allowance(budget).allowed(sum(fed), frames_of(segments)), sum(fed))
        return divide(total, fed) if self.acts_on_projector else fed

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int | None:
        n = sum(s.fed for s in segments) + separators
        allowed = self.allowance().allowed(n, frames_of(segments))
        return _exact(allowed, n) if self.kept == "exact" else None

    def select(self, tokens: VisualTokens) -> Selection:
        x, text = tokens.features, tokens.text_embeddings
        text = x[:0] if text is None else text
        norms, text_norms = (y.float().abs().sum(-1) for y in (x, text))
        allowed = self.allowance().allowed(len(tokens), frames_of(tokens.segments))
        return Selection(self._choose(x, norms, text, text_norms, allowed))

    def prefill_layers(self, num_layers: int, entering: float = 1.0) -> tuple[int, ...]:
        return () if self.acts_on_projector else (self.layer,)

    def check_depth(self, num_layers: int, entering: float = 1.0) -> None:
        if not self.acts_on_projector:
            check_inside((self.layer,), num_layers, self.info.name)

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        assert tokens.keys is not None and tokens.normed is not None and tokens.item is not None
        visual, text, norms = tokens.visual_rows, tokens.text_rows, tokens.keys().float().abs().sum(-1)
        x = tokens.normed() if self.normed else tokens.hidden_states
        item, kept, items = tokens.item[visual], [], tokens.item[visual].unique()
        for each in items:
            mine = (item == each).nonzero()[:, 0]
            rows = visual[mine]
            after = text[text > rows[-1]]
            # of the tokens that the unpatched model would feed, where a projector strategy goes first
            allowed = self.budget * len(rows) * (tokens.total_visual / len(visual))
            if not self.allowance().is_share:
                allowed = self.budget * tokens.units / len(items)
            kept.append(mine[self._choose(x[rows], norms[rows], x[after], norms[after], allowed)])
        return Selection(torch.cat(kept).sort().values)

    def _choose(self, x: Tensor, norms: Tensor, text: Tensor, text_norms: Tensor, allowed: float) -> Tensor:
        """Ascending indices of the tokens (n, d) to keep, of which `allowed` may stay; text is (t, d)."""
        count = _exact(allowed, len(x))
        pivots = _largest(norms, min(self.image_pivots, count if self.kept == "exact" else len(x)))
        guides = torch.cat([x[pivots], text[_largest(text_norms, self.text_pivots)]])
        each = math.ceil((count - len(pivots)) / len(guides))
        if self.kept == "published":
            each = int(allowed / (self.image_pivots + self.text_pivots) + 1e-6)
            count = min(len(x), len(pivots) + each * len(guides))
        taken = torch.zeros_like(norms, dtype=torch.bool).index_fill_(0, pivots, True)
        left = count - len(pivots)
        for similar in cosines(guides, x):
            order = similar.masked_fill(taken, torch.inf).sort(stable=True).indices
            taken[order[: min(each, left)]] = True
            left -= min(each, left)
        return taken.nonzero()[:, 0]


def _exact(allowed: float, n: int) -> int:
    return min(n, max(1, round(allowed)))


def _largest(norms: Tensor, count: int) -> Tensor:
    """Indices of the largest, in falling order, the lower index among equals."""
    return norms.sort(descending=True, stable=True).indices[:count]
