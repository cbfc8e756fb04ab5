"""Interleaved timing of each (strategy, budget) with the unpatched model."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import vtoken

from ..stage_times import PHASES, Times
from ..strategies.budgets import Budget
from ..strategies.registry import parse_strategy
from .shapes import Workload
from .timing import decode, floor, peak_bytes, prefill, spread

SHARED_DENSE = 3  # cells that are compared with the run of the unpatched model just before them


class Cell:
    """One strategy at one budget, timed in turns with the unpatched model."""

    def __init__(self, work: Workload, strategy: str, budget: float | int) -> None:
        self.work, self.strategy, self.budget = work, strategy, budget
        self.dense: list[Times] = []
        self.short: list[Times] = []
        self.floors: list[float] = []
        self.decoding: list[tuple[Times, Times]] = []
        self.refused: str | None = None
        self.facts: dict[str, Any] = {}
        self.even: int | None = None  # tokens that every layer reads, if they are equally many

    @contextmanager
    def applied(self) -> Iterator[None]:
        given = parse_strategy(self.strategy)
        with warnings.catch_warnings(), vtoken.applied(self.work.model, given, budget=self.budget):
            warnings.filterwarnings("ignore", "The weights of")  # new ones take the same time as trained ones
            yield

    def look(self, dense: tuple[int, int]) -> None:
        """One untimed call: counts, bytes, promised FLOPs, or the sentence of a refusing strategy.

        `dense` are the bytes at the peak and in the cache of the unpatched model.
        """
        try:
            with self.applied():
                peak, cache = peak_bytes(self.work)
                report = vtoken.report(self.work.model)
        except (ValueError, NotImplementedError) as refusal:
            self.refused = str(refusal)
            return
        layers = report.visual_per_layer
        if len(set(layers)) == 1:
            self.even = sum(report.prompt_tokens) - report.tokens_in + layers[0]
        self.facts = {
            "tokens": [report.tokens_in, report.average_visual_tokens],
            "flops": [report.flops_dense, report.flops],
            "kv_bytes": [dense[1], cache],
            "peak_bytes": [dense[0], peak],
        }

    def share(self, other: Cell) -> None:
        """Take over the times of another cell, if the strategy serves this model."""
        try:
            with self.applied():
                self.facts, self.even = other.facts, other.even
                self.dense, self.short, self.floors, self.decoding = (
                    other.dense,
                    other.short,
                    other.floors,
                    other.decoding,
                )
        except (ValueError, NotImplementedError) as refusal:
            self.refused = str(refusal)

    def turn(self, dense: Times, floors: dict[int, float]) -> None:
        """One timed prefill after that of the unpatched model, and one of the LLM alone on as many tokens."""
        with self.applied():
            short = prefill(self.work)
        self.dense.append(dense)
        self.short.append(short)
        if self.even is not None:
            if self.even not in floors:
                floors[self.even] = floor(self.work, self.even)
            self.floors.append(floors[self.even])

    def decode_turn(self, steps: int) -> None:
        dense = decode(self.work, steps)
        with self.applied():
            self.decoding.append((dense, decode(self.work, steps)))

    def decode_like(self, other: Cell) -> None:
        """Take over the decode steps of a cell whose cache holds as much, with the prefill of this one."""
        own, theirs = (
            statistics.median(t["total"] for t in c.short) if c.short else 0.0 for c in (self, other)
        )
        more = own - theirs
        self.decoding += [(d, s | {"total": s["total"] + more}) for d, s in other.decoding]

    def result(self) -> dict[str, Any]:
        """Plain numbers: medians in ms, speed-ups with their spread over the pairs, promised ones."""
        out: dict[str, Any] = {"strategy": self.strategy, "budget": self.budget}
        if self.refused is not None:
            return out | {"refused": self.refused}
        out |= self.facts
        if not self.short:
            return out | {"refused": "the time limit came first"}

        def middle(times: Sequence[Times]) -> Times:
            return {p: 1e3 * statistics.median(t[p] for t in times) for p in (*PHASES, "total")}

        dense = middle(self.dense)
        out |= {"ms_dense": dense, "ms": middle(self.short)}
        pairs = [*zip(self.dense, self.short)]
        llm = [s["choose"] + s["llm"] for s in self.short]
        promise = out["flops"][0] / out["flops"][1]
        other = 1 - dense["llm"] / dense["total"]
        out["promised"] = {"llm": promise, "prefill": 1 / (other + (1 - other) / promise)}
        out["measured"] = {
            "llm": spread([d["llm"] / t for d, t in zip(self.dense, llm)]),
            "prefill": spread([d["total"] / s["total"] for d, s in pairs]),
        }
        out["kept"] = {p: out["measured"][p]["median"] / out["promised"][p] for p in ("llm", "prefill")}
        out["overhead"] = spread([s["choose"] / d["total"] for d, s in pairs])
        if self.floors:
            out["attainable"] = spread([d["llm"] / f for d, f in zip(self.dense, self.floors)])
            out["kept"]["attainable"] = statistics.median(f / t for f, t in zip(self.floors, llm))
        if self.decoding:
            out["decode_ms"] = [
                1e3 * statistics.median(p[i]["decode"] for p in self.decoding) for i in (0, 1)
            ]
            out["decode"] = spread([d["decode"] / s["decode"] for d, s in self.decoding])
            out["end_to_end_ms"] = [
                1e3 * statistics.median(p[i]["total"] for p in self.decoding) for i in (0, 1)
            ]
            out["end_to_end"] = spread([d["total"] / s["total"] for d, s in self.decoding])
        return out


def measure(
    work: Workload,
    strategies: Sequence[str],
    budgets: Sequence[float | int],
    repeats: int = 5,
    steps: int = 64,
    limit: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time every strategy at every budget in turns with the unpatched model.

    A turn is the unpatched model, then up to three cells: A B C D A E F G. What cannot differ is measured
    once: budget 1.0 is the unpatched model whatever the strategy; decode steps depend only on how much the
    cache holds, and end to end their time is added to each cell's own prefill; the LLM alone depends on the
    number of its tokens, within a round.

    Args:
        work: the model, which must not be patched, and its prompt.
        strategies: names; two joined by + share a budget.
        budgets: shares or counts.
        repeats: timed turns per cell; a third as many of generation.
        steps: decode steps, 0 for none.
        limit: seconds after which no further turn begins; a cell that had none says so.
        progress: called with the next step in words.
    """
    start = time.monotonic()

    def late(share: float) -> bool:
        return limit is not None and time.monotonic() - start > share * limit

    prefill(work)
    whole = peak_bytes(work)
    cells = [Cell(work, s, b) for b in budgets for s in strategies]
    timed: list[Cell] = []
    identity: Cell | None = None
    for cell in cells:
        progress(f"{cell.strategy} {cell.budget}")
        if identity is not None and Budget(cell.budget).is_all:
            cell.share(identity)
        elif not late(0.5):
            cell.look(whole)
            if cell.facts:
                timed.append(cell)
                identity = cell if Budget(cell.budget).is_all else None
    for i in range(repeats):
        floors: dict[int, float] = {}
        for n, cell in enumerate(timed):
            if late(0.75):
                break
            progress(f"{cell.strategy} {cell.budget}, {i + 1} of {repeats}")
            if n % SHARED_DENSE == 0:
                dense = prefill(work)
            cell.turn(dense, floors)
    leads: dict[int, Cell] = {}
    for cell in timed:
        leads.setdefault(cell.facts["kv_bytes"][1], cell)
    for i in range(-(-repeats // 3) if steps else 0):
        for cell in leads.values():
            if not late(1.0):
                progress(f"generating {cell.strategy} {cell.budget}, {i + 1}")
                cell.decode_turn(steps)
    for cell in timed:
        lead = leads[cell.facts["kv_bytes"][1]]
        if cell is not lead:
            cell.decode_like(lead)
    return [cell.result() for cell in cells]
