"""PyramidDrop: a share of the visual tokens goes at the end of each stage of the LLM."""

from __future__ import annotations

from dataclasses import dataclass

from ..selection import Selection
from ..tokens import PrefillTokens
from .base import Strategy, top_k
from .common import schedule
from .registry import register

LEAST_RATIO = 0.25  # below it a budget moves the cuts towards the input, down to layer 1


@register(
    "pyramiddrop",
    summary="Drop a fixed share of the visual tokens at a quarter, half and three quarters of the LLM.",
    stages=("prefill",),
    budget_means="average",
    paper="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy "
    "Reduction, arXiv 2410.17247",
    code="github.com/Cooperx521/PyramidDrop",
    code_licence="MIT",
    differs="The ratio follows from the budget; budgets below a third, for which the published cuts leave "
    "no room, move the cuts towards the input, and rank the embeddings only if one layer that reads "
    "everything would use them up. Positions are kept unless positions='renumber'.",
)
@dataclass
class PyramidDrop(Strategy):
    """PyramidDrop without training (arXiv 2410.17247).

    The cuts lie before layers T/4, T/2 and 3T/4 of T. At each, visual tokens are ranked by the attention
    that the layer itself would pay to them from the last token of the prompt (a preview on its unread input),
    averaged over heads. Of N tokens int(N r), int(N r^2), int(N r^3) stay. The budget is the average over all
    layers; r = 0.5, as published, is 46.875 % at any depth divisible by four.

    Args:
        layers: 0-based layers before which to drop, instead of the quarters.
        ratio: r, instead of the one that follows from the budget; or a list as in the public code, of N the
            share that stays after each cut.

    Raises:
        ValueError: for shares outside of (0, 1], that rise, or that are not as many as `layers`.
    """

    budget: float | int = 0.46875
    layers: tuple[int, ...] | None = None
    ratio: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        schedule.check_layers(self.layers)
        listed = self.ratio if isinstance(self.ratio, tuple) else (self.ratio or 1.0,)
        if self.ratio == 0 or not all(0 < r <= 1 for r in listed) or list(listed) != sorted(listed)[::-1]:
            raise ValueError(
                "ratio must lie in (0, 1], or be a list of such shares that never rise as (0.5, 0.25, 0.125),"
                f" found {self.ratio!r}."
            )
        self._check_listed(3 if self.layers is None else len(self.layers))

    def _check_listed(self, cuts: int) -> None:
        if isinstance(self.ratio, tuple) and len(self.ratio) != cuts:
            raise ValueError(
                f"ratio must have a share for each of the {cuts} cuts, found {self.ratio!r}: pass as many, or"
                " as many layers."
            )

    def prefill_layers(self, num_layers: int, entering: float = 1.0) -> tuple[int, ...]:
        if self.layers is not None:
            return tuple(self.layers)
        share = self.budget / entering if self.allowance().is_share and self.ratio is None else 1.0
        for first in range(max(1, num_layers // 4), 0, -1):
            inside = schedule.quarters(first, num_layers)
            if share == 1 or schedule.ratio_for(share, schedule.lengths(inside, num_layers)) >= LEAST_RATIO:
                return inside
        return inside if share * num_layers > 1 else schedule.quarters(0, num_layers)

    def check_depth(self, num_layers: int, entering: float = 1.0) -> None:
        cuts, name = self.prefill_layers(num_layers, entering), self.info.name
        schedule.check_inside(cuts, num_layers, name)
        self._check_listed(len(cuts))
        if self.allowance().is_share and self.ratio is None:
            schedule.refuse_if_unreachable(entering, self.budget, schedule.lengths(cuts, num_layers), name)

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        cuts, visual = self.prefill_layers(tokens.num_layers, tokens.entering), tokens.visual_rows
        if "counts" not in tokens.memory:
            tokens.memory["counts"] = self._counts(tokens, cuts)
        count = tokens.memory["counts"][cuts.index(tokens.layer)]
        if count >= len(visual):
            return Selection.everything(len(visual), visual.device)
        assert tokens.preview_rows is not None
        return Selection(top_k(tokens.preview_rows(tokens.last_row)[:, 0, visual].mean(0), count))

    def _counts(self, tokens: PrefillTokens, cuts: tuple[int, ...]) -> list[int]:
        n = len(tokens.visual_rows)
        if isinstance(self.ratio, tuple):
            return [max(1, int(n * share + 1e-6)) for share in self.ratio]
        if self.ratio is not None:
            return [max(1, int(n * self.ratio**i + 1e-6)) for i in range(1, len(cuts) + 1)]
        average, lengths = schedule.wanted(self.budget, tokens), schedule.lengths(cuts, tokens.num_layers)
        return [n] * len(cuts) if average >= n else schedule.counts_for(n, average, lengths, self.info.name)
