"""Fill the tables of README.md, docs/families.md and docs/choosing.md, from the registries, docs/board,
benchmarks/results/cpu.json and what the tests saw of the model families.

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
from vtoken.bench.report import load
from vtoken.eval.board.board import Board, key
from vtoken.eval.board.ranking import counts
from vtoken.strategies import list_names, strategy_info
from vtoken.strategies.trained import trained_names

ROOT = Path(__file__).parents[1]
SHOWN = ("farcover", "hired", "vtc_cls", "random", "uniform", "pool")
BUDGETS = (0.33, 0.2, 0.1, 0.05, 0.02)
FASTER = ("divprune", "fastv", "stc")  # before the LLM, inside it, in the tower: the same in every shape
PLACES = {
    ("pixels",): "pixels, before the vision tower",
    ("encoder",): "layers of the vision tower",
    ("encoder", "projector"): "layers of the vision tower, and the tokens after it",
    ("projector",): "tokens between the tower and the LLM",
    ("prefill",): "tokens after some layers of the LLM",
    ("cache",): "the KV cache",
}
SEVERAL = "several of these"
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
    """One row for all strategies that act at the same place; their index says what each does."""
    alike: dict[str, list[str]] = {place: [] for place in (*PLACES.values(), SEVERAL)}
    for info in map(strategy_info, list_names()):
        if info.cls.__module__.startswith("vtoken."):
            link = f"[`{info.name}`](docs/strategies/{info.name}.md)"
            alike[PLACES.get(info.stages, SEVERAL)].append(f"*{link}*" if info.baseline else link)
    return table(["acts on", "strategies"], [[place, ", ".join(links)] for place, links in alike.items()])


def abilities() -> dict[str, tuple[str, ...]]:
    """By model type of vtoken's own what the tests saw it do."""
    known = json.loads(FAMILIES.read_text(encoding="utf-8"))
    own = [kind for kind in list_families() if adapter_class(kind).__module__.startswith("vtoken.")]
    return {kind: tuple(known.get(kind, ())) for kind in own}


def served() -> str:
    """The model types by what they read, and those that streams and vLLM take."""
    known = abilities()
    kinds = {
        "images and videos": [kind for kind, can in known.items() if "video" in can],
        "images": [kind for kind, can in known.items() if "video" not in can],
        "live streams too": [kind for kind, can in known.items() if "streaming" in can],
        "in vLLM too": [kind for kind, can in known.items() if "vllm" in can],
    }
    rows = [[what, ", ".join(f"`{kind}`" for kind in names)] for what, names in kinds.items()]
    return table(["reads", "`config.model_type`"], rows)


def families() -> str:
    """One row for all model types with the same abilities."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for kind, can in abilities().items():
        alike.setdefault(can, []).append(f"`{kind}`")
    rows = [
        [", ".join(kinds), *("yes" if ability in can else "" for ability in COLUMNS)]
        for can, kinds in sorted(alike.items(), key=lambda pair: pair[1])
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


def answers() -> str:
    """Of each board farcover and the best strategy without weights, by budget."""
    trained, rows = set(trained_names()), []
    for file in sorted((ROOT / "docs" / "board").glob("*.json")):
        if "medium" not in json.loads(file.read_text(encoding="utf-8")).get("settings", {}):
            continue  # encoders
        board = Board.load(file)
        row = [board.title.removeprefix("Tiny "), f"{100 * board.at[key('dense', 1.0)].accuracy:.1f}"]
        for budget in BUDGETS:
            of = {c.strategy: c for c in board.cells if c.budget == budget and counts(c)}
            best = max(
                (c for c in of.values() if c.strategy not in trained), key=lambda c: c.right, default=None
            )
            told = [f"{100 * of['farcover'].accuracy:.1f}"] if "farcover" in of else []
            if best and (not told or best.right > of["farcover"].right):
                told.append(f"{best.strategy} {100 * best.accuracy:.1f}")
            row.append("; ".join(told))
        rows.append(row)
    header = ["tiny model", "all tokens", *(f"budget {b}" for b in BUDGETS)]
    return table(header, rows)


def command() -> str:
    """How the boards were made, as their page tells."""
    page = (ROOT / "docs" / "board.md").read_text(encoding="utf-8")
    return re.search(r"^Made by `vtoken eval tiny .*`\.$", page, re.M)[0]


def speed() -> str:
    """Of each shape the shares of tower and LLM, and how much faster three kinds of strategies make it."""
    rows = []
    for name, shape in load(ROOT / "benchmarks" / "results" / "cpu.json")["shapes"].items():
        of = {c["strategy"]: c for c in shape["cells"] if c["budget"] == 0.2 and "refused" not in c}
        times = of[FASTER[0]]["ms_dense"]
        shares = [f"{times[part] / times['total']:.0%}" for part in ("tower", "llm")]
        gains = [(of[s]["measured"]["prefill"]["median"], of[s]["end_to_end"]["median"]) for s in FASTER]
        rows.append([name, str(shape["visual_tokens"]), *shares, *(f"{a:.1f}, {b:.1f}" for a, b in gains)])
    columns = [f"`{s}` ({', '.join(strategy_info(s).stages)})" for s in FASTER]
    return table(["shape", "visual tokens", "tower", "LLM", *columns], rows)


def save_families(record: Path) -> None:
    """Write docs/families.json from what a run of the tests recorded; what it did not run stays."""
    known: dict[str, list[str]] = json.loads(FAMILIES.read_text("utf-8")) if FAMILIES.exists() else {}
    for line in record.read_text(encoding="utf-8").splitlines():
        kind, ability, works = json.loads(line)
        can = {*known.get(kind, ())} - {ability} | ({ability} if works else set())
        known[kind] = [name for name in COLUMNS if name in can]
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


PAGES = {
    "README.md": (board, strategies, served),
    "docs/families.md": (families, refused),
    "docs/choosing.md": (speed, answers, command),
}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        save_families(Path(argument))
    for page, tables in PAGES.items():
        (ROOT / page).write_text(filled(page, *tables), encoding="utf-8")
