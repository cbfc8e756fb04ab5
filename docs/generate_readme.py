"""Fill the tables of README.md and docs/families.md, from the registries, docs/board/llava.json and what the
tests saw of the model families.

    python docs/generate_readme.py
    python docs/generate_readme.py FILE  # of pytest --record-families FILE: writes docs/families.json first
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from vtoken.adapters.refused import (
    CHOSEN_KEYS,
    ENCODER_DECODER,
    LANGUAGE_MODELS,
    REASONS,
    WINDOW_AFTER_PROMPT,
)
from vtoken.adapters.registry import adapter_class, list_families
from vtoken.eval.board.board import Board
from vtoken.strategies import list_names, strategy_info

ROOT = Path(__file__).parents[1]
SHOWN = ("hired", "vtc_cls", "random", "uniform", "pool")
FAMILIES = ROOT / "docs" / "families.json"
COLUMNS = {
    "image": "images",
    "several": "several",
    "ragged": "ragged batch",
    "video": "video",
    "selection": "projector",
    "attention": "tower attention",
    "merging": "encoder",
    "prefill": "prefill",
    "streaming": "streaming",
    "vllm": "vLLM",
}


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
    """One row for all model types with the same abilities."""
    known = json.loads(FAMILIES.read_text(encoding="utf-8"))
    alike: dict[tuple[str, ...], list[str]] = {}
    for kind in list_families():
        if adapter_class(kind).__module__.startswith("vtoken."):
            alike.setdefault(tuple(known.get(kind, ())), []).append(f"`{kind}`")
    rows = [
        [", ".join(kinds), *("yes" if ability in abilities else "" for ability in COLUMNS)]
        for abilities, kinds in sorted(alike.items(), key=lambda pair: pair[1])
    ]
    return table(["`config.model_type`", *COLUMNS.values()], rows)


def refused() -> str:
    """One row for all model types, or language models, with the same reason."""
    alike: dict[str, list[str]] = {}
    for kind, why in REASONS.items():
        alike.setdefault(why, []).append(f"`{kind}`")
    for kind, why in LANGUAGE_MODELS.items():
        alike.setdefault(why, []).append(f"those over `{kind}`")
    alike[ENCODER_DECODER].append("other encoder-decoder models")
    alike[CHOSEN_KEYS].append("those over other LLMs with an index of keys")
    alike[WINDOW_AFTER_PROMPT] = ["those over LLMs with such a cache (`unlimited_ocr`)"]
    return table(["models", "why"], [[", ".join(kinds), why] for why, kinds in alike.items()])


def save_families(record: Path) -> None:
    """Write docs/families.json from what a run of the tests recorded; what it did not run stays."""
    known: dict[str, list[str]] = json.loads(FAMILIES.read_text("utf-8")) if FAMILIES.exists() else {}
    for line in record.read_text(encoding="utf-8").splitlines():
        kind, ability, works = json.loads(line)
        abilities = {*known.get(kind, ())} - {ability} | ({ability} if works else set())
        known[kind] = [name for name in COLUMNS if name in abilities]
    known = dict(sorted(known.items()))
    FAMILIES.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def filled(page: str, *tables: Callable[[], str]) -> str:
    """A page with fresh tables after their markers."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for make in tables:
        marker = f"<!-- {make.__name__} -->"
        text, found = re.subn(rf"{marker}\n(.+\n)*", lambda m: f"{marker}\n{make()}\n", text)  # noqa: B023
        assert found == 1, f"{page} needs the marker {marker} once"
    return text


PAGES = {"README.md": (board, strategies, families), "docs/families.md": (families, refused)}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        save_families(Path(argument))
    for page, tables in PAGES.items():
        (ROOT / page).write_text(filled(page, *tables), encoding="utf-8")
