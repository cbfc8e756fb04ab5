"""Stacked bars of the reports of `video.py`: seconds of every stage, one bar per clip and way.

python benchmarks/video_plot.py benchmarks/results/video_cpu*.json --out docs/video_stages.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vtoken.video_answers import STAGES

COLOURS = dict(zip(STAGES, ("#4c78a8", "#72b7b2", "#f58518", "#e45756", "#54a24b", "#b8b8b8", "#dddddd")))


def draw(reports: list[dict[str, Any]], out: Path) -> None:
    """One panel per model and number of frames, two side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for report in reports for row in report["rows"]]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["frames"]), []).append(row)
    across = min(2, len(groups))
    down = -(-len(groups) // across)
    height = down * (1 + 0.28 * max(map(len, groups.values())))
    figure, panels = pyplot.subplots(down, across, figsize=(8 * across, height), squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.remove()
    for panel, ((model, frames), mine) in zip(panels.flat, groups.items(), strict=False):
        left = [0.0] * len(mine)
        for stage in STAGES:
            width = [row["seconds"][stage] for row in mine]
            panel.barh(range(len(mine)), width, left=left, label=stage, color=COLOURS[stage])
            left = [a + b for a, b in zip(left, width, strict=True)]
        for place, (row, end) in enumerate(zip(mine, left, strict=True)):
            panel.text(end, place, f" {row['speed']:.1f}x", va="center", fontsize=8)
        panel.set_yticks(range(len(mine)), [f"{row['clip']}: {row['row']}" for row in mine], fontsize=8)
        panel.invert_yaxis()
        panel.set(title=f"{model}, {frames} frames", xlabel="seconds", xlim=(0, 1.08 * max(left)))
        panel.legend(fontsize=8, ncols=len(STAGES), loc="upper center", bbox_to_anchor=(0.4, -0.1))
    figure.tight_layout()
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw([json.loads(path.read_text("utf-8")) for path in arguments.reports], arguments.out)


if __name__ == "__main__":
    main()
