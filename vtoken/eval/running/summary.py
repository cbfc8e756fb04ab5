"""Summaries of finished runs: accuracy against measured tokens, details, JSON, Markdown and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..board.board import Board
from .runner import Outcome

if TYPE_CHECKING:
    from rich.console import Console


def summary(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """One row per run after a head: measured tokens, LLM FLOPs, accuracy, the benchmark's figures, TTFT.

    Baselines are marked by a star.
    """
    frames = any(o.run.frames for o in outcomes)
    columns = list(dict.fromkeys(c for o in outcomes for c in o.breakdown.columns))
    head = ["strategy", "budget", *["frames"] * frames, "visual tokens", "FLOPs", "right, % [95 %]"]
    unreadable, unparsed = any(o.unreadable for o in outcomes), any(o.unparsed for o in outcomes)
    rows = [[*head, *columns, "TTFT, ms", *["unparsed"] * unparsed, *["unreadable"] * unreadable]]
    for o in outcomes:
        low, high = o.cell.interval
        rows.append(
            [
                f"{o.cell.strategy} *" if o.run.strategy and o.cell.baseline else o.cell.strategy,
                str(o.run.budget),
                *[str(o.run.frames)] * frames,
                f"{o.cell.tokens:.1f} of {o.cell.tokens_in:.1f}",
                f"{100 * o.cell.flops:.1f} %",
                f"{100 * o.cell.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                *(o.breakdown.columns.get(c, "") for c in columns),
                f"{1000 * o.ttft:.1f}",
                *[str(len(o.unparsed))] * unparsed,
                *[str(len(o.unreadable))] * unreadable,
            ]
        )
    return rows


def markdown(
    title: str, outcomes: Sequence[Outcome], settings: dict[str, Any], left_out: Sequence[str]
) -> str:
    """All tables, settings and unreadable items as a Markdown page."""
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in settings.items()), ""]
    lines += [
        "Visual tokens per question are measured, averaged over the LLM's layers; FLOPs are the LLM's"
        " prefill, against"
    ]
    lines += [
        "all visual tokens; the time to the first token (TTFT) is the median. Answers that the protocol"
        " takes for"
    ]
    lines += [
        "none are unparsed; both they and questions whose image or video is unreadable count as wrong.",
        "Baselines are marked by a star.",
        "",
    ]
    lines += markdown_table(summary(outcomes))
    for o in outcomes:
        lines += ["", f"## {o.run.name}", "", *markdown_table(o.breakdown.rows)]
    lines += ["", *(f"Left out: {sentence}" for sentence in left_out)]
    for o in outcomes:
        lines += [f"- {o.run.name}: counted as wrong: {sentence}" for sentence in o.unreadable.values()]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose first row is its head."""
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + " --- |" * len(rows[0]), *rest]


def show(out: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first row is its head."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, head in enumerate(rows[0]):
        table.add_column(escape(head), justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    out.print(table)


def save(
    folder: Path,
    title: str,
    outcomes: Sequence[Outcome],
    settings: dict[str, Any],
    left_out: Sequence[str],
    command: str = "",
) -> list[Path]:
    """Write results.json, results.md and, for several runs, results.png; returns their paths.

    A plot of an earlier command is removed where this one draws none.

    `command` is what measured, for those who get the file.
    """
    paths = [folder / "results.json", folder / "results.md"]
    values = {
        "title": title,
        "command": command,
        "settings": settings,
        "runs": [o.to_dict() for o in outcomes],
        "left_out": list(left_out),
    }
    paths[0].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    text, plot = markdown(title, outcomes, settings, left_out), folder / "results.png"
    plot.unlink(missing_ok=True)
    if len(outcomes) > 1:
        from ..board.plot import draw

        paths.append(plot)
        draw(Board(title, settings, [o.cell for o in outcomes]), paths[-1])
        text += f"\n![accuracy against kept tokens]({paths[-1].name})\n"
    paths[1].write_text(text, encoding="utf-8")
    return paths
