"""Runs a benchmark: strategies x budgets, resumable, in parallel under `accelerate launch`."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...extras import require
from ...strategies.budgets import Budget
from ...strategies.registry import is_baseline
from ..benchmarks.task import Breakdown, Item, Prompt, Task, Unreadable
from ..board.board import Cell
from .answer_log import Record, Writer, check_settings, locked, read

SHARES = ("tokens", "tokens_in", "flops", "flops_dense", "seconds")


@dataclass(frozen=True)
class Run:
    """One strategy at one budget; `strategy` None: all visual tokens, `frames` None: the task's number."""

    strategy: str | None
    budget: float | int
    frames: int | None = None

    @property
    def name(self) -> str:
        words = f"{self.strategy} {self.budget}" if self.strategy else "all visual tokens"
        return words + (f", {self.frames} frames" if self.frames else "")

    @property
    def stem(self) -> str:
        """Stem of the run's file names."""
        return re.sub(r"[^\w.+-]+", "-", self.name)


@dataclass(frozen=True)
class Outcome:
    """Results of a finished run.

    Attributes:
        run: strategy, budget and frames.
        cell: measured tokens, FLOPs and right answers, per group in `cell.kinds`.
        ttft: median seconds to the first token.
        breakdown: the benchmark's own scores.
        wrong: the items that were answered wrong.
        unparsed: those among them in whose text the protocol finds no answer.
        unreadable: per item that could not be opened, why; each counts as answered wrong.
    """

    run: Run
    cell: Cell
    ttft: float
    breakdown: Breakdown
    wrong: list[str]
    unparsed: list[str]
    unreadable: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": asdict(self.run),
            **self.cell.to_dict(),
            "ttft": self.ttft,
            "scores": self.breakdown.scores,
            "wrong": self.wrong,
            "unparsed": self.unparsed,
            "unreadable": self.unreadable,
        }


def plan(
    strategies: Sequence[str],
    budgets: Sequence[float | int],
    frames: int | None = None,
    same_tokens_as: int | None = None,
) -> list[Run]:
    """All visual tokens once if a budget is 1.0, then every strategy at every other budget.

    Args:
        strategies: registered names, or several joined by "+".
        budgets: as for `vtoken.patch`.
        frames: per video.
        same_tokens_as: instead of `frames`: the number of frames that costs as much as this number unpruned.

    Raises:
        ValueError: if `same_tokens_as` is used with `frames` or with budgets that are no shares.
    """
    if same_tokens_as and frames:
        raise ValueError("--frames and --same-tokens-as exclude each other.")
    if same_tokens_as and not all(Budget(b).is_share for b in budgets):
        raise ValueError("--same-tokens-as needs budgets that are shares, such as 0.25.")

    def per(budget: float | int) -> int | None:
        return int(same_tokens_as / budget + 1e-9) if same_tokens_as else frames

    dense = [Run(None, 1.0, per(1.0))] if any(Budget(b).is_all for b in budgets) else []
    smaller = dict.fromkeys(b for b in budgets if not Budget(b).is_all)  # 1 and 1.0 are equal as keys
    return dense + [Run(name, b, per(b)) for name in dict.fromkeys(strategies) for b in smaller]


@dataclass(frozen=True)
class Processes:
    """Rank of this process, and the number of processes that work on a run."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @classmethod
    def found(cls) -> Processes:
        """As started by `accelerate launch` or `torchrun`, on GPUs or with gloo on a CPU; else one."""
        from datetime import timedelta

        import torch

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each would do all the work without it
            require("accelerate", extra="eval")
        try:
            from accelerate import PartialState
        except ImportError:
            return cls()
        # a week, as processes wait for the one with the longest videos
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
        return cls(state.process_index, state.num_processes, state.wait_for_everyone)


class Evaluation:
    """One task and one model, with a folder for the answers.

    Args:
        task: the benchmark.
        asker: the model.
        folder: for settings and answers; a run in it is continued.
        batch_size: prompts per `generate`. Batches are the same whatever was interrupted, however many
            processes there are: an unfinished one is asked again as a whole.
        settings: settings on which answers depend, in addition to the task's own.
        processes: see `Processes`.
        step: called with the number of questions just done.
    """

    def __init__(
        self,
        task: Task,
        asker: Any,
        folder: str | Path,
        batch_size: int = 1,
        settings: dict[str, Any] | None = None,
        processes: Processes | None = None,
        step: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.task, self.asker, self.folder, self.step = task, asker, Path(folder), step
        self.processes = processes or Processes()
        self.batches = [task.items[i : i + batch_size] for i in range(0, len(task.items), batch_size)]
        self.names = [item.name for item in task.items]
        used = task.settings() | {"batch_size": batch_size} | (settings or {})
        with self.alone():
            check_settings(self.folder, used, self.processes.index == 0)
        self.processes.wait()

    def alone(self) -> AbstractContextManager[None]:
        """Lock the folder against other evaluations, by the first process. See `answer_log.locked`."""
        return locked(self.folder) if self.processes.index == 0 else nullcontext()

    def run(self, run: Run) -> Outcome | str:
        """Ask the unanswered questions, wait for the other processes, and score.

        Returns:
            The outcome, or the sentence with which the strategy refuses this model, budget or kind of prompt.

        Raises:
            ValueError: if a record is missing (the item is named), or nothing could be opened.
            BlockingIOError: if another evaluation writes into the folder.
        """
        with self.alone():
            return self._run(run)

    def _run(self, run: Run) -> Outcome | str:
        done = read(self.folder, run.stem, self.names)
        self.processes.wait()  # no process writes before all have read
        # asked by all processes, so that all get the same answer
        prompt = self._readable(run) if self._open(done) else None
        if prompt and (refusal := self.asker.refusal(run.strategy, run.budget, prompt)):
            return refusal
        writer = Writer(self.folder, run.stem, self.processes.index)
        try:
            with self.asker.applied(run.strategy, run.budget):
                for batch in self._mine(done):
                    writer.append(self._ask(batch, run, done))
                    self.step(len(batch))
        finally:
            writer.close()
        self.processes.wait()
        return self.outcome(run, read(self.folder, run.stem, self.names))

    def progress(self, run: Run) -> tuple[int, int]:
        """Number of answers that a run has, and of questions left for this process."""
        done = read(self.folder, run.stem, self.names)
        return sum("answer" in r for r in done.values()), sum(map(len, self._mine(done)))

    def _open(self, done: dict[str, Record]) -> list[Sequence[Item]]:
        """Batches with at least one unanswered question."""
        return [b for b in self.batches if any("answer" not in done.get(i.name, {}) for i in b)]

    def _mine(self, done: dict[str, Record]) -> list[Sequence[Item]]:
        return self._open(done)[self.processes.index :: self.processes.count]

    def _readable(self, run: Run) -> Prompt | None:
        for item in self.task.items:
            try:
                return self.task.prompt(item, run.frames)
            except Unreadable:
                continue
        return None

    def _ask(self, batch: Sequence[Item], run: Run, done: dict[str, Record]) -> list[Record]:
        """The new records of a batch, in its order."""
        prompts: dict[str, Prompt] = {}
        fresh: dict[str, Record] = {}
        for item in batch:
            try:
                prompts[item.name] = self.task.prompt(item, run.frames)
            except Unreadable as error:
                fresh[item.name] = {"item": item.name, "error": str(error)}
        if any("answer" not in done.get(name, {}) for name in prompts):
            replies = self.asker(list(prompts.values()), self.task.max_new_tokens)
            for name, reply in zip(prompts, replies, strict=True):
                costs = asdict(reply)
                fresh[name] = {"item": name, "answer": costs.pop("text"), **costs}

        def is_new(name: str) -> bool:
            return name in fresh and (name not in done or ("error" in done[name] and "answer" in fresh[name]))

        return [fresh[item.name] for item in batch if is_new(item.name)]

    def outcome(self, run: Run, records: dict[str, Record]) -> Outcome:
        """Score a complete set of records. Raises ValueError naming an item without a record."""
        if missing := [name for name in self.names if name not in records]:
            raise ValueError(
                f"{run.name} has no answer to {missing[0]!r} and {len(missing) - 1} more: run it again to"
                " continue."
            )
        answered = [r for r in records.values() if "answer" in r]
        if not answered:
            raise ValueError(
                f"None of the {len(records)} items could be opened; the first:"
                f" {records[self.names[0]]['error']}"
            )
        labels = {item.name: self._label(item, records[item.name]) for item in self.task.items}
        right: dict[str, bool] = {}
        kinds: dict[str, tuple[int, int]] = {}
        for item in self.task.items:
            right[item.name] = labels[item.name] == item.answer
            hits, asked = kinds.get(item.group, (0, 0))
            kinds[item.group] = (hits + right[item.name], asked + 1)
        total = {key: sum(r[key] for r in answered) for key in SHARES}
        cell = Cell(
            strategy=run.strategy or "dense",
            budget=run.budget,
            baseline=run.strategy is None or is_baseline(run.strategy),
            tokens=total["tokens"] / len(answered),
            tokens_in=total["tokens_in"] / len(answered),
            flops=total["flops"] / total["flops_dense"],
            right=sum(right.values()),
            asked=len(right),
            kinds=kinds,
            seconds=total["seconds"],
        )
        unreadable = {name: records[name]["error"] for name in self.names if "error" in records[name]}
        wrong = [name for name in self.names if not right[name] and name not in unreadable]
        unparsed = [name for name in wrong if not labels[name]]
        ttft = statistics.median(r["ttft"] for r in answered)
        return Outcome(run, cell, ttft, self.task.breakdown(right), wrong, unparsed, unreadable)

    def _label(self, item: Item, record: Record) -> str:
        return self.task.read(item, record["answer"]) if "answer" in record else ""
