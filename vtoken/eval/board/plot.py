"""Plot of accuracy against kept visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...extras import require

if TYPE_CHECKING:
    from .board import Board


def draw(board: Board, path: str | Path) -> None:
    """Write a plot of all strategies of a board, baselines dashed, with 95 % intervals.

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
    names = list(dict.fromkeys(c.strategy for c in board.cells if c.strategy != "dense"))
    colours, markers = colormaps["tab20"].colors, "osD^vP*X<>hd"  # type: ignore[attr-defined]
    for i, name in enumerate(names):
        cells = sorted((c for c in board.cells if c.strategy == name), key=lambda c: c.tokens)
        share = [100 * c.accuracy for c in cells]
        bars = [
            [s - 100 * c.interval[0] for s, c in zip(share, cells)],
            [100 * c.interval[1] - s for s, c in zip(share, cells)],
        ]
        axes.errorbar(
            [c.tokens for c in cells],
            share,
            yerr=bars,
            label=name,
            color="dimgray" if cells[0].baseline else colours[i % len(colours)],
            linestyle="--" if cells[0].baseline else "-",
            marker=markers[i % len(markers)],
            markersize=5,
            linewidth=1.4,
            elinewidth=0.6,
            capsize=2,
            alpha=0.9,
        )
    for cell in (c for c in board.cells if c.strategy == "dense"):
        axes.axhline(
            100 * cell.accuracy, color="black", linewidth=0.8, linestyle=":", label="all visual tokens"
        )
    axes.set(
        xlabel="visual tokens per question, average over the LLM's layers",
        ylabel="exact answers, %",
        title=board.title,
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(path)
