"""The accuracy board: strategies x budgets on held-out questions, with measured token counts and Wilson intervals."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BUDGETS: tuple[float | int, ...] = (1.0, 0.5, 0.33, 0.2, 0.1)
Z95 = 1.959963984540054


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of `right` out of `asked`, within [0, 1].

    Raises:
        ValueError: unless 0 <= right <= asked and asked > 0.
    """
    if not 0 <= right <= asked or asked < 1:
        raise ValueError(f"A share needs 0 <= right <= asked and asked > 0, found {right} of {asked}.")
    share, square = right / asked, Z95 * Z95 / asked
    centre = (share + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(share * (1 - share) / asked + square / (4 * asked))
    return (0.0 if right == 0 else centre - half), (1.0 if right == asked else centre + half)


def parse_strategy(text: str) -> str | list[str]:
    """A registered name, or several that are joined by "+", as `vtoken.patch` takes them.

    Raises:
        ValueError: for a name that is not registered.
    """
    from ..strategies import strategy_info

    names = text.split("+")
    for name in names:
        strategy_info(name)
    return names if len(names) > 1 else text


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
        seconds: wall clock of all questions.
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
        return asdict(self) | {"accuracy": self.accuracy, "interval": self.interval}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        fields = {k: values[k] for k in cls.__dataclass_fields__}
        return cls(**fields | {"kinds": {k: tuple(v) for k, v in fields["kinds"].items()}})


def measure(
    model: Any,
    questions: Sequence[tuple[str, str]],
    say: Callable[[Any, int, int], Sequence[str]],
    strategy: str | None,
    budget: float | int = 1.0,
    batch_size: int = 50,
    step: Callable[[int], None] = lambda asked: None,
) -> Cell:
    """Ask all questions under one strategy.

    Args:
        model: the unpatched model; it is unpatched again afterwards.
        questions: (kind, right answer) each.
        say: the model's answers to questions first..last, `say(model, first, last)`.
        strategy: registered name, or several joined by "+"; None asks the unpatched model.
        budget: as for `vtoken.patch`.
        batch_size: questions per call of `say`.
        step: told the number of questions after each batch.
    """
    import contextlib
    import time

    import vtoken

    # the dense row reads its counts off a patch that keeps everything, which is the unpatched model bit for bit
    context = vtoken.applied(model, parse_strategy(strategy or "uniform"), budget=budget if strategy else 1.0)
    tokens = tokens_in = flops = flops_dense = 0.0
    kinds: dict[str, list[int]] = {}
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(context)
        for first in range(0, len(questions), batch_size):
            some = questions[first : first + batch_size]
            said = say(model, first, first + len(some))
            report = vtoken.report(model)
            tokens += report.average_visual_tokens
            tokens_in += report.tokens_in
            flops, flops_dense = flops + report.flops, flops_dense + report.flops_dense
            for (kind, answer), text in zip(some, said, strict=True):
                counted = kinds.setdefault(kind, [0, 0])
                counted[0] += text == answer
                counted[1] += 1
            step(len(some))
    asked = len(questions)
    return Cell(
        strategy=strategy or "dense",
        budget=budget if strategy else 1.0,
        baseline=strategy is None or ("+" not in strategy and vtoken.strategy_info(strategy).baseline),
        tokens=tokens / asked,
        tokens_in=tokens_in / asked,
        flops=flops / flops_dense,
        right=sum(r for r, _ in kinds.values()),
        asked=asked,
        kinds={k: (r, n) for k, (r, n) in sorted(kinds.items())},
        seconds=time.perf_counter() - start,
    )


@dataclass
class Board:
    """A table of cells with what is needed to make it again.

    Attributes:
        title: what was measured.
        settings: model, number of questions, seed, versions.
        cells: the unpatched model first.
    """

    title: str
    settings: dict[str, Any]
    cells: list[Cell]

    def to_dict(self) -> dict[str, Any]:
        return {"title": self.title, "settings": self.settings, "cells": [c.to_dict() for c in self.cells]}

    @classmethod
    def load(cls, path: str | Path) -> Board:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(values["title"], values["settings"], [Cell.from_dict(c) for c in values["cells"]])

    def markdown(self, command: str) -> str:
        """Tables of accuracy per strategy and budget, and per kind of question at each budget."""
        budgets = list(dict.fromkeys(c.budget for c in self.cells if c.strategy != "dense"))
        names = list(dict.fromkeys(c.strategy for c in self.cells if c.strategy != "dense"))
        at = {(c.strategy, c.budget): c for c in self.cells}
        dense = at.get(("dense", 1.0))
        lines = [f"# {self.title}", "", f"Made by `{command}`.", ""]
        lines += [f"- {key}: {value}" for key, value in self.settings.items()]
        lines += [
            "",
            "Exact answers in %, 95 % Wilson interval in brackets, measured visual tokens per question (average over",
        ]
        lines += [
            "the LLM's layers) behind the @. Baselines are in italics; an empty field is a budget that the strategy refuses"
        ]
        lines += ["for a model of so few layers.", ""]
        if dense:
            lines += [f"Budget 1.0 is the unpatched model, the same for every strategy: {_entry(dense)}.", ""]
        lines += [_row(["strategy", *(f"budget {b}" for b in budgets)]), _row(["---"] * (len(budgets) + 1))]
        for name in names:
            cells = [at.get((name, b)) for b in budgets]
            shown = f"*{name}*" if any(c and c.baseline for c in cells) else name
            lines.append(_row([shown, *(_entry(c) if c else "" for c in cells)]))
        kinds = list(self.cells[0].kinds)
        for budget in budgets:
            lines += ["", f"## Per kind of question, budget {budget}", ""]
            lines += [
                _row(["strategy", "tokens", "LLM FLOPs", *kinds]),
                _row(["---", "---:", "---:", *["---:"] * len(kinds)]),
            ]
            for c in (dense, *(at.get((name, budget)) for name in names)):
                if c is None:
                    continue
                shares = (f"{100 * c.kinds[k][0] / c.kinds[k][1]:.1f}" for k in kinds)
                lines.append(_row([c.strategy, f"{c.tokens:.1f}", f"{100 * c.flops:.1f} %", *shares]))
        return "\n".join(lines) + "\n"

    def save_json(self, path: str | Path) -> None:
        """Write what `load` reads; folders are made if needed."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def save(self, stem: str | Path, command: str) -> list[Path]:
        """Write `stem`.json, `stem`.md and `stem`.png; returns the three paths."""
        stem = Path(stem)
        paths = [stem.with_name(stem.name + end) for end in (".json", ".md", ".png")]
        self.save_json(paths[0])
        paths[1].write_text(
            self.markdown(command) + f"\n![accuracy against kept tokens]({paths[2].name})\n", encoding="utf-8"
        )
        from .plot import draw

        draw(self, paths[2])
        return paths


def versions() -> dict[str, str]:
    """What the numbers may depend on."""
    import torch
    import transformers

    import vtoken

    return {
        "vtoken": vtoken.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _entry(cell: Cell) -> str:
    low, high = cell.interval
    return f"{100 * cell.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}] @ {cell.tokens:.1f}"


def _row(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"
