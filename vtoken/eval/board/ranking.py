"""The order of strategies over several boards: mean rank among those that read as few tokens as was asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .board import Board, Cell

LEEWAY = 1.1  # times the tokens of a budget that a cell may read


@dataclass
class Places:
    """Ranks of one strategy, by medium; 1 is the best, equal answers share the mean of their ranks."""

    name: str
    baseline: bool
    ranks: dict[str, list[float]] = field(default_factory=dict)

    def mean(self, *media: str) -> float | None:
        """The mean rank on boards of these media, None without one."""
        every = [rank for medium in media or self.ranks for rank in self.ranks.get(medium, ())]
        return sum(every) / len(every) if every else None

    @property
    def count(self) -> int:
        return sum(map(len, self.ranks.values()))


def ranked(boards: Sequence[Board]) -> list[Places]:
    """All strategies in order of their mean rank over boards and budgets; those without a rank come last.

    A cell counts if it reads at most `LEEWAY` times the budget's share of the tokens, and is ranked among the
    cells of the same board and budget that count. The budgets of strategies that let early layers of the LLM
    read more are therefore left out where they read more.
    """
    out: dict[str, Places] = {}
    for board in boards:
        for name in board.names:
            baseline = any(c.baseline for c in board.cells if c.strategy == name)
            out.setdefault(name, Places(name, baseline))
        for budget in board.budgets:
            cells = [c for c in board.cells if c.strategy != "dense" and c.budget == budget and counts(c)]
            medium = str(board.settings.get("medium", "image"))
            for cell, rank in zip(cells, ranks(c.right / c.asked for c in cells), strict=True):
                out[cell.strategy].ranks.setdefault(medium, []).append(rank)
    last = float("inf")
    return sorted(out.values(), key=lambda places: (places.mean() or last, places.name))


def counts(cell: Cell) -> bool:
    """Whether a cell reads as few tokens as its budget says: a share, or tokens of one image."""
    asked = cell.budget * cell.tokens_in if isinstance(cell.budget, float) else cell.budget
    return cell.tokens <= LEEWAY * asked


def ranks(values: Iterable[float]) -> list[float]:
    """The rank of each value, 1 for the largest, the mean rank among equals."""
    given = list(values)
    return [sum(w > v for w in given) + (1 + sum(w == v for w in given)) / 2 for v in given]


def ranking(boards: Sequence[Board]) -> list[str]:
    """Markdown: one row per strategy, the mean rank on boards of images, of clips and of both."""
    media = list(dict.fromkeys(str(board.settings.get("medium", "image")) for board in boards))
    lines = [
        "| strategy | " + " | ".join([*(f"{m}s" for m in media), "all", "cells"]) + " |",
        "| --- |" + " ---: |" * (len(media) + 2),
    ]
    for places in ranked(boards):
        means = [places.mean(m) for m in media] + [places.mean()]
        shown = f"*{places.name}*" if places.baseline else places.name
        lines.append(
            f"| {shown} | {' | '.join('' if m is None else f'{m:.1f}' for m in means)} | {places.count} |"
        )
    return lines
