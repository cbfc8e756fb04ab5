"""Fills the tables of docs/performance.md from benchmarks/results: `python docs/generate_performance.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtoken.bench.report import GOAL_KEPT, GOAL_OVERHEAD, load, markdown, rows
from vtoken.strategies import strategy_info

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results"
SHOWN = ("strategy", "budget", "visual tokens", "choosing", "LLM promised", "LLM measured", "quartiles", "attainable")
SHOWN += ("prefill promised", "prefill measured", "decode", "end to end", "KV", "peak")


def machine() -> str:
    m = load(RESULTS / "cpu.json")["machine"]
    clock = "processor time" if m["clock"] == "cpu" else "wall time"
    versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "transformers"))
    return (
        f"{m['device']}, {m['threads']} thread(s), float32, {versions}, {clock}, load average {m['load']} at the start."
    )


def models() -> str:
    parts = []
    report = load(RESULTS / "cpu.json")
    for name, shape in report["shapes"].items():
        left = [c for c in shape["cells"] if "refused" in c]
        tokens = (
            f"{shape['visual_tokens']} visual and {shape['text_tokens']} text tokens, {shape['steps']} decode steps"
        )
        sizes = "; ".join(
            f"{part} {', '.join(f'{k} {v}' for k, v in shape[part].items())}" for part in ("llm", "tower")
        )
        parts += [f"**{name}**, {shape['scale']} scale: {tokens}; {sizes}; {shape['repeats']} turn(s).\n"]
        parts += [markdown(SHOWN, rows(shape["cells"], SHOWN)), ""]
        parts += [f"Left out: {c['strategy']} at {c['budget']}: {c['refused']}" for c in left]
    return "\n".join(parts).strip()


def goals() -> str:
    """The two goals of the CPU shape, by budget."""
    cells = [c for s in load(RESULTS / "cpu.json")["shapes"].values() for c in s["cells"] if "refused" not in c]
    body = []
    for budget in sorted({c["budget"] for c in cells}):
        own = [c for c in cells if c["budget"] == budget]
        front = [c for c in own if set(strategy_info(c["strategy"]).stages) <= {"projector", "encoder"}]
        spent = [c for c in front if c["overhead"]["median"] <= GOAL_OVERHEAD["cpu"]]
        kept = [c for c in own if c["kept"]["llm"] >= GOAL_KEPT]
        whole = [c for c in own if c["kept"]["prefill"] >= GOAL_KEPT]
        even = [c for c in own if "attainable" in c["kept"]]
        best = [c for c in even if c["kept"]["attainable"] >= GOAL_KEPT]
        body.append(
            [f"{budget}", f"{len(spent)} of {len(front)}", f"{len(kept)} of {len(own)}", f"{len(whole)} of {len(own)}"]
            + [f"{len(best)} of {len(even)}"]
        )
    header = ["budget", "choosing <= 5 % of the unpatched prefill (projector strategies)"]
    header += [f"LLM: measured >= {GOAL_KEPT} x promised", f"whole prefill: measured >= {GOAL_KEPT} x promised"]
    return markdown([*header, f"LLM: measured >= {GOAL_KEPT} x attainable"], body)


def kernels() -> str:
    cases = json.loads((RESULTS / "kernels_cpu.json").read_text(encoding="utf-8"))["cases"]
    body = []
    for name, c in cases.items():
        ratio, band = c["usual / vtoken"], c["share of copy bandwidth"]
        spread = f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
        times = [f"{c['ms'][k]:.2f}" for k in ("torch", "usual")]
        body.append([name, *times, spread, f"{band['median']:.0%}" if band else "-"])
    return markdown(["kernel", "torch twin ms", "usual ms", "usual / twin", "share of copy bandwidth"], body)


def peers() -> str:
    report = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    body = []
    for part in report.values():
        for name, times in part["ms"].items():
            words = times.get("failed") or ", ".join(f"{k} {v:.0f} ms" for k, v in times.items())
            body.append([name, str(part["about"]["kept"]), words])
    return markdown(["contestant", "kept tokens", "median"], body)


def page() -> str:
    """docs/performance.md with fresh tables behind their markers; an empty line ends a table's place."""
    text = PAGE.read_text(encoding="utf-8")
    made: dict[str, Callable[[], str]] = {f.__name__: f for f in (machine, goals, models, kernels, peers)}
    for name, make in made.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern, fresh = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.S), make()
        text, found = pattern.subn(_constant(f"{begin}\n{fresh}\n{end}"), text)
        assert found == 1, f"{PAGE.name} needs the markers {begin} and {end} once"
    return text


def _constant(text: str) -> Callable[[Any], str]:
    return lambda _: text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
