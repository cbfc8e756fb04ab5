"""Plots of a quality against its cost: boards (kept visual tokens), and any other points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...extras import require
from .ranking import ranked

if TYPE_CHECKING:
    from .board import Board

LEADERS = 6  # strategies of a board that are drawn in colour
REFERENCES = ("random", "uniform", "pool")
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito: told apart by all


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
    """Write a plot of all strategies of a board with 95 % intervals: the best by mean rank in colour.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    require("matplotlib", extra="eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = [p.name for p in ranked([board]) if p.ranks]
    leaders = [name for name in places if name not in REFERENCES][:LEADERS]
    labelled = "every other strategy"
    for name in board.names:
        cells = sorted((c for c in board.cells if c.strategy == name), key=lambda c: c.tokens)
        x, y = [c.tokens for c in cells], [100 * c.accuracy for c in cells]
        if name in leaders:
            low, high = zip(*(c.interval for c in cells))
            colour = PALETTE[leaders.index(name)]
            axes.fill_between(
                x, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.1, lw=0
            )
            axes.plot(x, y, color=colour, marker="o", ms=5, lw=2, zorder=3, label=name)
        elif name in REFERENCES:
            dash = ("--", ":", "-.")[REFERENCES.index(name)]
            axes.plot(
                x, y, color="black", linestyle=dash, marker=".", lw=1.4, zorder=2, label=f"{name} (baseline)"
            )
        else:
            axes.plot(x, y, color="0.8", marker=".", lw=1, zorder=1, label=labelled)
            labelled = "_"
    whole = next((c for c in board.cells if c.strategy == "dense"), None)
    if whole is not None:
        axes.axhline(
            100 * whole.accuracy, color="black", lw=0.8, label=f"all {whole.tokens:.0f} visual tokens"
        )
    axes.set(xlabel="visual tokens that the language model reads per question", ylabel="right answers, %")
    axes.set(title=f"{board.title}: right answers with fewer visual tokens", xscale="log")
    if whole is not None:
        shares = {b for b in board.budgets if isinstance(b, float)}
        axes.set_xticks(sorted({round(share * whole.tokens_in, 1) for share in shares | {1.0}}))
        least = min(cell.tokens for cell in board.cells)
        axes.set_xlim(0.8 * least, 1.1 * whole.tokens_in)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    order = {name: i for i, name in enumerate(leaders)}
    each = zip(*axes.get_legend_handles_labels())
    handles, labels = zip(*sorted(each, key=lambda pair: order.get(pair[1], len(order))))
    axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    figure.savefig(path)


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
