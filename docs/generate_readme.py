"""Fill the tables of README.md from the registries and from docs/board/llava.json.

python docs/generate_readme.py
"""

from __future__ import annotations

import re
from pathlib import Path

from vtoken.adapters.registry import list_families
from vtoken.eval.board.board import Board
from vtoken.strategies import list_names, strategy_info

ROOT = Path(__file__).parents[1]
SHOWN = ("hired", "vtc_cls", "random", "uniform", "pool")
WIDTH = 110


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def board() -> str:
    cells = {(c.strategy, c.budget): c for c in Board.load(ROOT / "docs" / "board" / "llava.json").cells}
    dense = cells["dense", 1.0]
    budgets = sorted({b for s, b in cells if s in SHOWN}, reverse=True)
    rows = [["all visual tokens", *[f"{100 * dense.accuracy:.1f} %"] * len(budgets)]]
    for name in SHOWN:
        shown = f"*{name}* (baseline)" if strategy_info(name).baseline else name
        rows.append(
            [
                shown,
                *(f"{100 * c.accuracy:.1f} % @ {c.tokens:.0f}" for c in (cells[name, b] for b in budgets)),
            ]
        )
    return table([f"of {dense.tokens_in:.0f} tokens", *(f"budget {b}" for b in budgets)], rows)


def strategies() -> str:
    infos = [strategy_info(n) for n in list_names() if strategy_info(n).cls.__module__.startswith("vtoken.")]
    rows = [
        [
            f"[`{i.name}`](docs/strategies/{i.name}.md)",
            ", ".join(i.stages),
            i.summary,
            "baseline" if i.baseline else i.paper.rpartition(", ")[2],
        ]
        for i in infos
    ]
    return table(["name", "where it acts", "what it does", "source"], rows)


def families() -> str:
    return (
        "Values of `config.model_type` that can be patched: "
        + ", ".join(f"`{f}`" for f in list_families())
        + "."
    )


def readme() -> str:
    """README.md with fresh tables after their markers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for make in (board, strategies, families):
        marker = f"<!-- {make.__name__} -->"
        text, found = re.subn(rf"{marker}\n(.+\n)*", lambda m: f"{marker}\n{make()}\n", text)  # noqa: B023
        assert found == 1, f"README.md needs the marker {marker} once"
    return text


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
