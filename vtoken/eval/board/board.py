"""The accuracy board: strategies x budgets on held-out questions, measured tokens, Wilson intervals."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..._json import compact, read
from ...checks import fit, fit_field
from ...strategies.budgets import UNIT, Budget, check_budget, with_unit
from ...strategies.registry import is_baseline
from ..intervals import wilson

BUDGETS: tuple[float | int, ...] = (0.5, 0.33, 0.2, 0.1, 0.05)
LOWER: tuple[float | int, ...] = (0.33, 0.2, 0.1, 0.05, 0.02)  # for pictures and clips of 500 tokens or more
SHAPE: dict[str, Any] = {"title": str, "settings": dict[str, Any], "cells": list}  # of a board's file


@dataclass
class Cell:
    """One strategy at one budget.

    Attributes:
        strategy: registered name, or "dense" for all visual tokens.
        budget: as given to `vtoken.patch`.
        baseline: whether the strategy exists to be compared with.
        tokens: visual tokens per question, averaged over the LLM's layers, as `vtoken.report` measured them.
        tokens_in: visual tokens per question that the unpatched model reads.
        flops: LLM prefill FLOPs as a share of the unpatched model's.
        right, asked: exact answers and questions.
        kinds: per kind of question, (exact answers, questions).
        seconds: processor time of all questions.
    """

    strategy: str
    budget: float | int
    baseline: bool
    tokens: float
    tokens_in: float
    flops: float
    right: int
    asked: int
    kinds: dict[str, tuple[int, int]]
    seconds: float

    @property
    def accuracy(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson(self.right, self.asked)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            UNIT: Budget(self.budget).unit,
            "accuracy": self.accuracy,
            "interval": self.interval,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        """Raises ValueError for a value of another type than its field's, or one that is missing."""
        values = with_unit(fit("a cell", values, dict))
        made = cls(**{f.name: fit_field(cls, f.name, values.get(f.name)) for f in fields(cls)})
        check_budget(made.budget)
        wilson(made.right, made.asked)
        return made


Key = tuple[str, float | int, str]


def key(strategy: str, budget: float | int) -> Key:
    """Identity of a cell in one board: all tokens (1.0) are another budget than one token (1)."""
    return strategy, budget, Budget(budget).unit


@dataclass
class Batch:
    """Questions that are asked in one call.

    Attributes:
        asked: (kind, right answer) of each.
        say: the patched model's answers, in the same order.
    """

    asked: Sequence[tuple[str, str]]
    say: Callable[[Any], Sequence[str]]


def measure(
    model: Any,
    batches: Sequence[Batch],
    strategy: str | None,
    budget: float | int = 1.0,
    step: Callable[[int], None] = lambda asked: None,
    given: Any = None,
) -> Cell:
    """Ask all questions under one strategy.

    Args:
        model: the unpatched model; it is unpatched again afterwards.
        batches: the questions.
        strategy: registered name, or several joined by "+"; None asks the unpatched model.
        budget: as for `vtoken.patch`.
        step: called with the number of questions after each batch.
        given: for `vtoken.patch` in place of the name, for a strategy with weights.
    """
    import time

    import vtoken

    tokens = tokens_in = flops = flops_dense = 0.0
    kinds: dict[str, list[int]] = {}
    start = time.process_time()
    # the dense row is counted by a patch that keeps everything: the unpatched model, bit for bit
    given = (given or strategy) if strategy else "uniform"
    with vtoken.applied(model, given, budget=budget if strategy else 1.0):
        for batch in batches:
            said = batch.say(model)
            report = vtoken.report(model)
            tokens += report.average_visual_tokens * report.prompts
            tokens_in += report.tokens_in
            flops, flops_dense = flops + report.flops, flops_dense + report.flops_dense
            for (kind, answer), text in zip(batch.asked, said, strict=True):
                counted = kinds.setdefault(kind, [0, 0])
                counted[0] += text == answer
                counted[1] += 1
            step(len(batch.asked))
    asked = sum(n for _, n in kinds.values())
    return Cell(
        strategy=strategy or "dense",
        budget=budget if strategy else 1.0,
        baseline=strategy is None or is_baseline(strategy),
        tokens=tokens / asked,
        tokens_in=tokens_in / asked,
        flops=flops / flops_dense,
        right=sum(r for r, _ in kinds.values()),
        asked=asked,
        kinds={k: (r, n) for k, (r, n) in sorted(kinds.items())},
        seconds=time.process_time() - start,
    )


@dataclass
class Board:
    """Cells of one model, with the settings needed to measure them again.

    Attributes:
        title: model and kind of questions.
        settings: model, number of questions, seed, versions.
        cells: the unpatched model first.
        command: what measured the newest cell, empty if no command did.
    """

    title: str
    settings: dict[str, Any]
    cells: list[Cell]
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        told = {"title": self.title} | ({"command": self.command} if self.command else {})
        return told | {"settings": self.settings, "cells": [c.to_dict() for c in self.cells]}

    @classmethod
    def load(cls, path: str | Path) -> Board:
        """Read a file of `save`. Raises ValueError if it is something else."""
        values = read(Path(path))
        try:
            made = {n: fit(n, fit("the file", values, dict).get(n), h) for n, h in SHAPE.items()}
            cells = [Cell.from_dict(c) for c in made["cells"]]
            return cls(made["title"], made["settings"], cells, fit("command", values.get("command", ""), str))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no board of `vtoken eval`: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write a file for `load`; folders are made if needed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")  # a kill leaves the old cells or the new ones
        partial.write_text(compact(self.to_dict()) + "\n", encoding="utf-8")
        partial.replace(path)

    @property
    def at(self) -> dict[Key, Cell]:
        """The cells by `key(strategy, budget)`."""
        return {key(c.strategy, c.budget): c for c in self.cells}

    @property
    def names(self) -> list[str]:
        """The strategies, in the order in which they were measured."""
        return list(dict.fromkeys(c.strategy for c in self.cells if c.strategy != "dense"))

    @property
    def budgets(self) -> list[float | int]:
        return list({key("", c.budget): c.budget for c in self.cells if c.strategy != "dense"}.values())

    def chance(self, tokens: float) -> float | None:
        """Accuracy of `random` at this number of tokens, linear between its cells and the unpatched model.

        None if the number lies below its smallest cell, or if `random` was not measured.
        """
        known = sorted((c.tokens, c.accuracy) for c in self.cells if c.strategy in ("random", "dense"))
        if not any(c.strategy == "random" for c in self.cells) or not known[0][0] <= tokens <= known[-1][0]:
            return None
        high = next(i for i, (t, _) in enumerate(known) if t >= tokens)
        (t0, a0), (t1, a1) = known[max(0, high - 1)], known[high]
        return a1 if t1 == t0 else a0 + (a1 - a0) * (tokens - t0) / (t1 - t0)

    def below_random(self) -> list[tuple[Cell, float]]:
        """Cells of published methods wholly below `random` at equal tokens, each with `random`'s value."""
        found = []
        for cell in self.cells:
            chance = None if cell.baseline else self.chance(cell.tokens)
            if chance is not None and cell.interval[1] < chance:
                found.append((cell, chance))
        return found


def versions() -> dict[str, str]:
    """Versions of the packages on which the numbers may depend."""
    import torch
    import transformers

    import vtoken

    return {
        "vtoken": vtoken.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
