"""The work of `vtoken bench`: build, measure, print, save."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import vtoken

from ..extras import require
from ..strategies.registry import parse_strategy
from . import report as reports
from .cells import measure
from .shapes import SHAPES, Workload, build, in_words, parameters, shipped
from .timing import one_thread

if TYPE_CHECKING:
    from rich.console import Console

# the default measurement: a real shape in less than a minute
SHAPE, STRATEGIES, SHARES, SECONDS, STEPS = (
    "llava-1.5-7b",
    ("hired", "visionzip", "fastv"),
    (0.2, 0.5),
    40.0,
    16,
)
BUDGETS, ALL_STEPS = (0.1, 0.2, 0.33, 0.5, 1.0), 64
SMALL = 30e6  # parameters of a model whose calls are mostly overhead
# of runs that may share a report
SAME = ("device", "type", "threads", "clock", "torch", "transformers", "vtoken")


def run(
    out: Console,
    shapes: Sequence[str],
    scale: str | None,
    device: str | None,
    model_id: str | None,
    strategies: Sequence[str],
    budgets: Sequence[float | int],
    repeats: int,
    steps: int | None,
    limit: float | None,
    clock: str | None,
    output: str | None,
    plot: str | None,
) -> None:
    """Measure the given shapes one after the other; an existing report at `output` gains them.

    Without shapes and model it is LLaVA-1.5's shape, smaller than published on a CPU, with a few strategies
    and a time limit.

    Raises ValueError for what is unknown, unreadable or does not fit together, ImportError where matplotlib
    is missing.
    """
    for strategy in strategies:
        parse_strategy(strategy)
    if shapes and model_id:
        raise ValueError(
            "Give either --shape or --model: a shape is built with random weights, a model is loaded."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    quick = not shapes and model_id is None
    scale = scale or ("full" if device.startswith("cuda") else "quick" if quick else "cpu")
    if quick:
        shapes, strategies = (SHAPE,), strategies or STRATEGIES
        budgets, limit = budgets or SHARES, SECONDS if limit is None else limit
    steps = steps if steps is not None else STEPS if quick else ALL_STEPS
    budgets = budgets or BUDGETS
    alone = quick and clock is None and device == "cpu"
    clock = clock or ("cpu" if alone else "wall")
    if clock == "cpu" and device != "cpu":
        raise ValueError(
            f"--clock cpu times this process's processor, not the {device} device: leave it out."
        )
    with one_thread() if alone else nullcontext():
        _measure_all(
            out,
            shapes,
            scale,
            device,
            model_id,
            strategies,
            budgets,
            repeats,
            steps,
            limit,
            clock,
            output,
            plot,
        )


def _measure_all(
    out: Console,
    shapes: Sequence[str],
    scale: str,
    device: str,
    model_id: str | None,
    strategies: Sequence[str],
    budgets: Sequence[float | int],
    repeats: int,
    steps: int,
    limit: float | None,
    clock: str,
    output: str | None,
    plot: str | None,
) -> None:
    machine = reports.machine(torch.device(device)) | {"clock": clock}
    report: dict[str, Any] = {"machine": machine, "shapes": {}}
    if output is not None:
        _check_folder(output)
        if Path(output).exists():
            report = _joined(reports.load(output), report)
    if plot is not None:
        require("matplotlib", extra="demo")
        _check_folder(plot)
    every: list[str | None] = [*SHAPES] if "all" in shapes else [*shapes]
    for name in every or [None]:
        with out.status(f"building {name or model_id or 'the tiny model'}"):
            built = shipped(model_id) if name is None else build(name, scale, device)
            work = replace(built, clock=clock)
        out.print(in_words(work), highlight=False)
        cells = _measured(out, work, strategies, budgets, repeats, steps, limit)
        report["shapes"][work.name] = work.about | {"repeats": repeats, "steps": steps, "cells": cells}
        if output is not None:
            reports.save(report, output)
    if plot is not None:
        reports.draw(report, plot)


def _measured(
    out: Console,
    work: Workload,
    strategies: Sequence[str],
    budgets: Sequence[float | int],
    repeats: int,
    steps: int,
    limit: float | None,
) -> list[dict[str, Any]]:
    names = strategies or vtoken.list_strategies(model=work.model)
    with out.status("") as status:
        cells = measure(
            work, names, budgets, repeats, steps, limit, lambda words: status.update(f"{work.name}: {words}")
        )
    title = f"{work.name}, {work.about['scale']} scale, {work.about['dtype']} on {work.model.device}"
    if work.clock == "cpu":
        title += f", processor time, threads: {torch.get_num_threads()}"
    out.print(reports.table(cells, title))
    for line in reports.goals(cells, work.model.device.type):
        out.print(line, highlight=False)
    if parameters(work) < SMALL and work.about["scale"] != "quick":
        out.print(
            f"{work.name} is so small that a call is mostly overhead, which no strategy saves: its times say"
            " nothing about models of billions of parameters. Leave out --model for one that shows what they"
            " gain.",
            highlight=False,
        )
    for refused in [c for c in cells if "refused" in c]:
        out.print(
            f"left out: {refused['strategy']} {refused['budget']}: {refused['refused']}",
            highlight=False,
            markup=False,
        )
    return cells


def _joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    for key in SAME:
        if old["machine"].get(key) != new["machine"][key]:
            was = old["machine"].get(key)
            raise ValueError(
                f"The report at --output was made with {key} {was}, this is {new['machine'][key]}: choose"
                " another file, and --compare the two."
            )
    return old | {"machine": new["machine"]}


def _check_folder(path: str) -> None:
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder {str(folder)!r} does not exist.")


def compare(out: Console, a: str, b: str) -> None:
    """Print the ratio of b's times to a's. Raises ValueError for no report, or for nothing in common."""
    from rich.table import Table

    first, second = reports.load(a), reports.load(b)
    table = Table(*reports.COMPARED, caption="b / a compares times of two runs; speed-ups are within one run")
    for row in reports.compare(first, second):
        table.add_row(*row)
    for letter, path, one in (("a", a, first), ("b", b, second)):
        m = one["machine"]
        out.print(
            f"{letter}: {path}: {m['device']}, {m['threads']} threads, torch {m['torch']}, vtoken"
            f" {m['vtoken']}"
        )
    out.print(table)
