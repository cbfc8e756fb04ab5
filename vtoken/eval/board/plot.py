"""Plots of a quality against its cost: boards (kept visual tokens), and any other points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...extras import require

if TYPE_CHECKING:
    from .board import Board


@dataclass(frozen=True)
class Point:
    """One run in a plot.

    Attributes:
        name: of its curve; "dense" is drawn as a line across the plot.
        cost, value: its place.
        low, high: ends of the value's interval.
        baseline: whether its curve is dashed.
    """

    name: str
    cost: float
    value: float
    low: float
    high: float
    baseline: bool = False


def draw(board: Board, path: str | Path) -> None:
    """Write a plot of all strategies of a board, baselines dashed, with 95 % intervals.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    points = [
        Point(c.strategy, c.tokens, 100 * c.accuracy, 100 * low, 100 * high, c.baseline)
        for c in board.cells
        for low, high in [c.interval]
    ]
    cost, value = "visual tokens per question, average over the LLM's layers", "exact answers, %"
    draw_points(points, path, board.title, cost, value, "all visual tokens")


def draw_points(
    points: Sequence[Point], path: str | Path, title: str, cost: str, value: str, dense: str
) -> None:
    """Write a plot with one curve per name, baselines dashed.

    Args:
        points: in any order.
        path: of a file that matplotlib can write.
        title, cost, value: of the plot and its axes.
        dense: words for the line of "dense".

    Raises:
        ImportError: if matplotlib is not installed.
    """
    require("matplotlib", extra="eval")
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(dict.fromkeys(p.name for p in points if p.name != "dense"))
    colours, markers = colormaps["tab20"].colors, "osD^vP*X<>hd"  # type: ignore[attr-defined]
    for i, name in enumerate(names):
        curve = sorted((p for p in points if p.name == name), key=lambda p: p.cost)
        axes.errorbar(
            [p.cost for p in curve],
            [p.value for p in curve],
            yerr=[[p.value - p.low for p in curve], [p.high - p.value for p in curve]],
            label=name,
            color="dimgray" if curve[0].baseline else colours[i % len(colours)],
            linestyle="--" if curve[0].baseline else "-",
            marker=markers[i % len(markers)],
            markersize=5,
            linewidth=1.4,
            elinewidth=0.6,
            capsize=2,
            alpha=0.9,
        )
    for point in (p for p in points if p.name == "dense"):
        axes.axhline(point.value, color="black", linewidth=0.8, linestyle=":", label=dense)
    axes.set(xlabel=cost, ylabel=value, title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(path)
