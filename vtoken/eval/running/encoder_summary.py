"""Summaries of runs of plain encoders: quality against GFLOPs and speed; JSON, Markdown and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..benchmarks.encoder_task import EncoderTask
from ..board.plot import Point, draw_points
from .encoder_runs import EncoderOutcome
from .summary import markdown_table


def summary(task: EncoderTask, outcomes: Sequence[EncoderOutcome]) -> list[list[str]]:
    """One row per run after a head: scores, GFLOPs, samples per second, speed-up; baselines have a star."""
    columns = list(outcomes[0].breakdown.columns)
    unreadable = any(o.unreadable for o in outcomes)
    head = ["run", *columns, "GFLOPs", "share", f"{task.unit}s/s", "speed-up"]
    rows = [[*head, *["unreadable"] * unreadable]]
    for o in outcomes:
        star = " *" if o.run.strategy and o.run.baseline else ""
        known = o.gflops is not None and o.gflops_dense
        rows.append(
            [
                o.run.name + star,
                *(o.breakdown.columns[c] for c in columns),
                f"{o.gflops:.4g}" if known else "unknown",
                f"{100 * o.gflops / o.gflops_dense:.1f} %" if known else "unknown",  # type: ignore[operator]
                f"{o.per_second:.4g}",
                f"{o.speedup:.2f}",
                *[str(len(o.unreadable))] * unreadable,
            ]
        )
    return rows


def markdown(
    title: str, task: EncoderTask, outcomes: Sequence[EncoderOutcome], settings: dict[str, Any]
) -> str:
    """All tables, settings and unreadable samples as a Markdown page."""
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in settings.items()), ""]
    lines += [
        f"GFLOPs are multiply-adds / 1e9 per {task.unit}; {task.unit}s per second count the encoder alone, in"
        " one process; the speed-up is",
        "against the unpatched model on the same batches, timed in turns. Baselines are marked by a star.",
        "",
        *markdown_table(summary(task, outcomes)),
    ]
    for o in outcomes:
        lines += ["", f"## {o.run.name}", "", *markdown_table(o.breakdown.rows)]
    sentences = dict.fromkeys(s for o in outcomes for s in o.unreadable.values())
    lines += ["", *(f"- counted as wrong: {sentence}" for sentence in sentences)]
    return "\n".join(lines).rstrip() + "\n"


def points(outcomes: Sequence[EncoderOutcome]) -> list[Point]:
    """The runs as points of a plot; runs of unknown cost are left out."""
    return [
        Point(o.run.strategy or "dense", o.gflops, *o.point, o.run.baseline)
        for o in outcomes
        if o.gflops is not None
    ]


def save(
    folder: Path, title: str, task: EncoderTask, outcomes: Sequence[EncoderOutcome], settings: dict[str, Any]
) -> list[Path]:
    """Write results.json, results.md and results.png; returns their paths."""
    paths = [folder / f"results.{end}" for end in ("json", "md", "png")]
    values = {"title": title, "settings": settings, "runs": [o.to_dict() for o in outcomes]}
    paths[0].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    draw_points(points(outcomes), paths[2], title, f"GFLOPs per {task.unit}", task.axis, "unpatched")
    text = markdown(title, task, outcomes, settings)
    paths[1].write_text(text + f"\n![{task.axis} against GFLOPs]({paths[2].name})\n", encoding="utf-8")
    return paths
