"""Runs of a benchmark of plain encoders, and their outcomes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...strategies import strategy_info
from ...strategies.registry import is_baseline, split_names
from ..benchmarks.encoder_task import EncoderTask
from ..benchmarks.task import Breakdown
from .answer_log import Record


@dataclass(frozen=True)
class EncoderRun:
    """A strategy with hyper-parameters as for `vtoken.patch`; `strategy` None is the unpatched model."""

    strategy: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = [f"{key}={json.dumps(value)}" for key, value in self.options.items()]
        return " ".join([self.strategy or "unpatched", *words])

    @property
    def stem(self) -> str:
        """Stem of the run's file names."""
        return re.sub(r"[^\w.+-]+", "-", self.name)

    @property
    def baseline(self) -> bool:
        return self.strategy is None or is_baseline(self.strategy)


DENSE = EncoderRun()


def plan(strategies: Sequence[str], amounts: Mapping[str, Sequence[Any]], **options: Any) -> list[EncoderRun]:
    """The unpatched model, then every strategy at every amount; without amounts at its defaults.

    Args:
        strategies: registered names.
        amounts: per argument of `vtoken.patch` that says how much to merge ("r", "budget", "flops") its
            values. An `r` goes to the strategies that have one.
        options: further hyper-parameters of all strategies.

    Raises:
        ValueError: if a strategy has no `r` and nothing else is given, or two runs are the same.
    """
    runs = [DENSE]
    for name in dict.fromkeys(strategies):
        has_r = any("r" in strategy_info(part).defaults for part in split_names([name]))
        pairs = [(key, v) for key, some in amounts.items() if key != "r" or has_r for v in some]
        if not pairs and any(amounts.values()):
            raise ValueError(f"{name} has no option 'r': give --budgets or --flops for it.")
        runs += [EncoderRun(name, {key: value} | options) for key, value in pairs]
        runs += [EncoderRun(name, dict(options))] if not pairs else []
    stems = [run.stem for run in runs]
    if twice := next((run.name for run in runs if stems.count(run.stem) > 1), None):
        raise ValueError(f"{twice} is asked for twice: name every setting once.")
    return runs


@dataclass(frozen=True)
class EncoderOutcome:
    """Results of a finished run.

    Attributes:
        run: strategy and hyper-parameters.
        gflops, gflops_dense: multiply-adds / 1e9 per sample, of this run and of the unpatched model, as
            `vtoken.report` counts them; averages. None where no strategy ran, whose report would tell.
        tokens: per layer, the tokens of an image that it reads, as the report counts them; averages. Empty
            for the unpatched model.
        per_second: samples per second of encoding in one process, without reading and preprocessing.
        speedup: time of the unpatched model on the same batches, divided by that of this run.
        breakdown, point: scores, and the figure of the plot with its interval, see `EncoderTask`.
        unreadable: per sample that could not be opened, why.
    """

    run: EncoderRun
    gflops: float | None
    gflops_dense: float | None
    tokens: list[float]
    per_second: float
    speedup: float
    breakdown: Breakdown
    point: tuple[float, float, float]
    unreadable: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "strategy": self.run.strategy,
            "options": self.run.options,
            "baseline": self.run.baseline,
            "gflops": self.gflops,
            "gflops_dense": self.gflops_dense,
            "tokens_per_layer": self.tokens,
            "per_second": self.per_second,
            "speedup": self.speedup,
            "scores": self.breakdown.scores,
            "unreadable": self.unreadable,
        }


def is_whole(task: EncoderTask, run: EncoderRun, record: Record) -> bool:
    """Whether a record has a value with its cost."""
    wanted = ["seconds"] + ["seconds_dense", "gflops", "gflops_dense"] * (run.strategy is not None)
    tokens = record.get("tokens", [] if run.strategy is None else None)
    return (
        all(type(record.get(key)) in (int, float) for key in wanted)
        and isinstance(tokens, list)
        and all(type(n) in (int, float) for n in tokens)
        and task.whole(record.get("value"))
    )


def check_complete(task: EncoderTask, run: EncoderRun, records: dict[str, Record]) -> None:
    """Raise ValueError if a sample has no record, none could be opened, or one that the score needs."""
    names = [sample.name for sample in task.samples]
    if missing := [name for name in names if name not in records]:
        raise ValueError(
            f"{run.name} has no value of {missing[0]!r} and {len(missing) - 1} more: run it again to"
            " continue."
        )
    broken = [records[name]["error"] for name in names if "error" in records[name]]
    if len(broken) == len(names):
        raise ValueError(f"None of the {len(broken)} {task.unit}s could be opened; the first: {broken[0]}")
    if broken and not task.lenient:
        more = f" ({len(broken) - 1} more like it)" if len(broken) > 1 else ""
        raise ValueError(
            f"{broken[0]}{more}; all {len(names)} {task.unit}s are needed for a score: mend the file and run"
            " it again, what is done stays."
        )


def outcome(task: EncoderTask, run: EncoderRun, done: dict[str, dict[str, Record]]) -> EncoderOutcome:
    """Score a complete set of records, by the stems of all runs; the others tell what the unpatched costs."""
    records, dense = done[run.stem], run.strategy is None
    values = [r for r in records.values() if "value" in r]
    sources: list[dict[str, Record]] = [*done.values()] if dense else [records]
    costs = [r for source in sources for r in source.values() if "gflops" in r]
    seconds = sum(r["seconds"] for r in values)
    unpatched = seconds if dense else sum(r["seconds_dense"] for r in values)
    breakdown = task.breakdown({name: r["value"] for name, r in records.items() if "value" in r})
    return EncoderOutcome(
        run=run,
        gflops=_mean([r["gflops_dense" if dense else "gflops"] for r in costs]),
        gflops_dense=_mean([r["gflops_dense"] for r in costs]),
        tokens=[] if dense else [sum(layer) / len(values) for layer in zip(*(r["tokens"] for r in values))],
        per_second=len(values) / seconds,
        speedup=unpatched / seconds,
        breakdown=breakdown,
        point=task.point(breakdown),
        unreadable={name: r["error"] for name, r in records.items() if "error" in r},
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
