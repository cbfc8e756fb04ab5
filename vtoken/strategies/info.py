"""Metadata of a strategy in the registry."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

Stage = Literal["pixels", "encoder", "projector", "prefill", "cache"]
BudgetMeans = Literal["entrance", "average", "cut", "tower", "encoder", "cache", "attention"]
BUDGET_MEANS: dict[str, str] = {
    "entrance": "visual tokens that enter the LLM",
    "average": "visual tokens that an LLM layer reads, the average over all layers",
    "cut": "visual tokens that the LLM reads after the cut",
    "tower": "tokens of a frame that the vision tower computes",
    "cache": "visual tokens that the KV cache keeps; the LLM reads them all once",
    "attention": "tokens of the prompt, text included, that pass the attention of an LLM layer",
    "encoder": "patch tokens that are left after the encoder's last layer, the visual tokens of an LLM",
}


@dataclass(frozen=True)
class StrategyInfo:
    """Metadata of a strategy in the registry.

    Attributes:
        name: the name that `vtoken.patch` takes.
        summary: one sentence.
        stages: where it acts: "pixels", "encoder", "projector", "prefill", "cache".
        paper: title and arXiv id, empty for a baseline.
        code: the published reference implementation.
        code_licence: its licence, "no licence stated" where the code names none.
        differs: what differs from the reference, in words.
        baseline: whether it exists to be compared with.
        experimental: whether parts of the method are not published.
        budget_means: what a budget counts, see `BUDGET_MEANS`; None where it is not told.
        cls: the dataclass.
    """

    name: str
    summary: str
    stages: tuple[Stage, ...]
    paper: str = ""
    code: str = ""
    code_licence: str = ""
    differs: str = ""
    baseline: bool = False
    experimental: bool = False
    budget_means: BudgetMeans | None = None
    cls: type[Any] = field(default=None, repr=False)  # type: ignore[assignment]

    @property
    def budget_counts(self) -> str:
        """Unit of a budget, in words; empty where it is not told."""
        return "" if self.budget_means is None else BUDGET_MEANS[self.budget_means]

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyper-parameters with their defaults."""
        return {f.name: f.default for f in fields(self.cls) if f.init}
