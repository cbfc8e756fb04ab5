"""Reports of a benchmark: JSON, tables, comparison of two runs, a plot."""

from __future__ import annotations

import os
import platform
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._json import compact, read
from ..checks import fit
from ..extras import require

if TYPE_CHECKING:
    from rich.table import Table

Report = dict[str, Any]
Cell = dict[str, Any]
SHAPE: dict[str, Any] = {"machine": dict[str, Any], "shapes": dict[str, dict[str, Any]]}  # of a report's file
MACHINE: dict[str, Any] = {"device": str, "threads": int, "torch": str | None, "vtoken": str | None}
GOAL_KEPT, GOAL_OVERHEAD = 0.9, {"cuda": 0.03, "cpu": 0.05}


def machine(device: torch.device) -> dict[str, Any]:
    """The device, its load and the versions that decide about speed."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "type": device.type,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        **{name: installed(name) for name in ("torch", "transformers", "triton", "vtoken")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def load(path: str | Path) -> Report:
    """Read a report of `vtoken bench --output`. Raises ValueError if it is none."""
    if not Path(path).is_file():
        raise ValueError(
            f"{str(path)!r} is no report of `vtoken bench --output`: no such file."
        ) from FileNotFoundError(path)
    try:
        report = fit("the file", read(Path(path)), dict)
        for key, hint in SHAPE.items():
            fit(key, report.get(key), hint)
        for key, hint in MACHINE.items():
            fit(key, report["machine"].get(key), hint)
        for shape in report["shapes"].values():
            fit("scale", shape.get("scale"), str)
            for cell in fit("cells", shape.get("cells"), list[dict]):
                fit("strategy", cell.get("strategy"), str)
                fit("budget", cell.get("budget"), float | int)
                if "refused" not in cell:
                    _check_cell(cell)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is no report of `vtoken bench --output`: {str(error).rstrip('.')}."
        ) from None
    return report


def _check_cell(cell: Cell) -> None:
    """Raise ValueError if a figure is missing that `compare`, `goals` and `draw` read."""
    times = fit("ms", cell.get("ms"), dict[str, Any])
    fit("ms of total", times.get("total"), float)
    for name in ("measured", "promised"):
        fit(name, cell.get(name), dict[str, Any])
    for part in ("llm", "prefill"):
        measured = fit(f"measured {part}", cell["measured"].get(part), dict[str, float])
        for figure in ("median", "q1", "q3"):
            fit(f"{figure} of measured {part}", measured.get(figure), float)
    fit("promised llm", cell["promised"].get("llm"), float)


def save(report: Report, path: str | Path) -> None:
    """Write the report whole or not at all: an interrupted run leaves the earlier shapes."""
    target = Path(path)
    half = target.with_name(target.name + ".part")
    half.write_text(compact(report, 4) + "\n", encoding="utf-8")
    half.replace(target)


def save_run(asked: Namespace, device: torch.device, **found: Any) -> None:
    """Save what a script was asked, the machine and what it found to `asked.out`, if there is one."""
    if asked.out:
        about = {name: value for name, value in vars(asked).items() if name != "out"}
        save({"about": about, "machine": machine(device), **found}, asked.out)


def _ratio(value: dict[str, float] | None) -> str:
    return f"{value['median']:.2f}" if value else "-"


def _quartiles(value: dict[str, float]) -> str:
    return f"{value['q1']:.2f} to {value['q3']:.2f}"


def _shares(value: Sequence[float] | None) -> str:
    return f"{value[1] / value[0]:.2f}" if value else "-"


COLUMNS: dict[str, Callable[[Cell], str]] = {
    "strategy": lambda c: c["strategy"],
    "budget": lambda c: f"{c['budget']}",
    "visual tokens": lambda c: f"{c['tokens'][0]} -> {c['tokens'][1]:.0f}",
    "tower ms": lambda c: f"{c['ms_dense']['tower']:.1f} -> {c['ms']['tower']:.1f}",
    "choosing": lambda c: f"{c['overhead']['median']:.1%}",
    "LLM ms": lambda c: f"{c['ms_dense']['llm']:.1f} -> {c['ms']['llm']:.1f}",
    "LLM promised": lambda c: f"{c['promised']['llm']:.2f}",
    "LLM measured": lambda c: _ratio(c["measured"]["llm"]),
    "quartiles": lambda c: _quartiles(c["measured"]["llm"]),
    "attainable": lambda c: _ratio(c.get("attainable")),
    "prefill promised": lambda c: f"{c['promised']['prefill']:.2f}",
    "prefill measured": lambda c: _ratio(c["measured"]["prefill"]),
    "its quartiles": lambda c: _quartiles(c["measured"]["prefill"]),
    "LLM (promised)": lambda c: f"{_ratio(c['measured']['llm'])} ({c['promised']['llm']:.2f})",
    "prefill (promised)": lambda c: f"{_ratio(c['measured']['prefill'])} ({c['promised']['prefill']:.2f})",
    "decode": lambda c: _ratio(c.get("decode")),
    "end to end": lambda c: _ratio(c.get("end_to_end")),
    "KV": lambda c: _shares(c["kv_bytes"]),
    "peak": lambda c: _shares(c["peak_bytes"]),
}
NARROW = (
    "strategy",
    "budget",
    "visual tokens",
    "choosing",
    "LLM (promised)",
    "prefill (promised)",
    "end to end",
    "KV",
)


def rows(cells: Sequence[Cell], columns: Sequence[str] = tuple(COLUMNS)) -> list[list[str]]:
    """One row of words per measured cell."""
    return [[COLUMNS[c](cell) for c in columns] for cell in cells if "refused" not in cell]


def table(cells: Sequence[Cell], title: str, columns: Sequence[str] = NARROW) -> Table:
    from rich.table import Table

    out = Table(
        *columns, title=title, caption="speed-ups over the unpatched model: medians of neighbouring runs"
    )
    for row in rows(cells, columns):
        out.add_row(*row)
    return out


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *body])


def goals(cells: Sequence[Cell], kind: str) -> list[str]:
    """Share of the measured cells that reached each goal, in words; `kind` is the type of the device."""
    done, most = [c for c in cells if "refused" not in c], GOAL_OVERHEAD.get(kind, GOAL_OVERHEAD["cpu"])
    kept = sum(c["kept"]["llm"] >= GOAL_KEPT for c in done)
    spent = sum(c["overhead"]["median"] <= most for c in done)
    return [
        f"LLM speed-up at least {GOAL_KEPT} x promised: {kept} of {len(done)} cells",
        f"choosing at most {most:.0%} of the unpatched prefill: {spent} of {len(done)} cells",
    ]


def compare(a: Report, b: Report) -> list[list[str]]:
    """Rows (shape, strategy, budget, prefill of a and b in ms, b / a, speed-ups of a and b) of common cells.

    Raises ValueError if there are none.
    """

    def cells(report: Report) -> dict[tuple[str, str, str], Cell]:
        found = ((n, s["scale"], c) for n, s in report["shapes"].items() for c in s["cells"])
        return {
            (f"{n} {scale}", c["strategy"], str(c["budget"])): c
            for n, scale, c in found
            if "refused" not in c
        }

    first, second = cells(a), cells(b)
    out = []
    for key in first:
        if key in second:
            x, y = first[key], second[key]
            old, new = x["ms"]["total"], y["ms"]["total"]
            speed = [f"{c['measured']['prefill']['median']:.2f}" for c in (x, y)]
            out.append([*key, f"{old:.1f}", f"{new:.1f}", f"{new / old:.2f}", *speed])
    if not out:
        raise ValueError("These two reports have no shape, strategy and budget in common.")
    return out


COMPARED = ("shape", "strategy", "budget", "prefill ms: a", "b", "b / a", "speed-up: a", "b")


def draw(report: Report, path: str | Path) -> None:
    """One panel per shape: measured against promised speed-up of the LLM's prefill, by strategy.

    Raises ImportError where matplotlib is missing, ValueError for an ending that names no picture format.
    """
    require("matplotlib", extra="demo")
    from matplotlib.figure import Figure

    shapes = {n: [c for c in s["cells"] if "refused" not in c] for n, s in report["shapes"].items()}
    shapes = {n: cells for n, cells in shapes.items() if cells}
    figure = Figure(figsize=(1 + 4.2 * max(1, len(shapes)), 4.6), layout="constrained")
    names = sorted({c["strategy"] for cells in shapes.values() for c in cells})
    axes = figure.subplots(1, max(1, len(shapes)), squeeze=False)[0]
    for axis, (shape, cells) in zip(axes, shapes.items()):
        for i, name in enumerate(names):
            own = sorted((c for c in cells if c["strategy"] == name), key=lambda c: c["promised"]["llm"])
            if own:
                x, y = ([c["promised"]["llm"] for c in own], [c["measured"]["llm"] for c in own])
                spread = [[m["median"] - m["q1"] for m in y], [m["q3"] - m["median"] for m in y]]
                middle = [m["median"] for m in y]
                style = {"fmt": ("o-", "s--", "^:")[i // 10 % 3], "ms": 3.5, "lw": 1, "elinewidth": 0.7}
                axis.errorbar(x, middle, spread, label=name, color=f"C{i % 10}", **style)
        end = max(c["promised"]["llm"] for c in cells)
        axis.plot([1, end], [1, end], color="0.5", lw=0.8, zorder=0)
        axis.plot([1, end], [GOAL_KEPT, GOAL_KEPT * end], color="0.5", lw=0.8, ls=":", zorder=0)
        axis.set(xscale="log", yscale="log", title=shape, xlabel="speed-up that the FLOPs promise")
    axes[0].set_ylabel("measured speed-up of the LLM's prefill")
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.suptitle(f"{report['machine']['device']}", fontsize=9)
    figure.savefig(path, dpi=110)
