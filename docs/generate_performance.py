"""Fill the tables of performance.md, cache.md, serving.md and streaming.md from benchmarks/results.

python docs/generate_performance.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtoken.bench.report import GOAL_KEPT, GOAL_OVERHEAD, load, markdown, rows
from vtoken.strategies import strategy_info

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHOWN = (
    "strategy",
    "budget",
    "visual tokens",
    "choosing",
    "LLM promised",
    "LLM measured",
    "quartiles",
    "attainable",
)
SHOWN += ("prefill promised", "prefill measured", "decode", "end to end", "KV", "peak")


def machine() -> str:
    m = load(RESULTS / "cpu.json")["machine"]
    return f"{_where(m)}, float32, load average {m['load']} at the start."


def _where(m: dict[str, Any]) -> str:
    clock = "processor time" if m["clock"] == "cpu" else "wall time"
    versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "transformers"))
    return f"{m['device']}, {m['threads']} thread(s), {clock}, {versions}"


def models() -> str:
    parts = []
    report = load(RESULTS / "cpu.json")
    for name, shape in report["shapes"].items():
        left = [c for c in shape["cells"] if "refused" in c]
        tokens = f"{shape['visual_tokens']} visual and {shape['text_tokens']} text tokens, "
        tokens += f"{shape['steps']} decode steps"
        sizes = "; ".join(
            f"{part} {', '.join(f'{k} {v}' for k, v in shape[part].items())}" for part in ("llm", "tower")
        )
        parts += [f"**{name}**, {shape['scale']} scale: {tokens}; {sizes}; {shape['repeats']} turn(s).\n"]
        parts += [markdown(SHOWN, rows(shape["cells"], SHOWN)), ""]
        parts += [f"Left out: {c['strategy']} at {c['budget']}: {c['refused']}" for c in left]
    return "\n".join(parts).strip()


def goals() -> str:
    """The two goals of the CPU shape, by budget."""
    cells = [
        c for s in load(RESULTS / "cpu.json")["shapes"].values() for c in s["cells"] if "refused" not in c
    ]
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
            [
                f"{budget}",
                f"{len(spent)} of {len(front)}",
                f"{len(kept)} of {len(own)}",
                f"{len(whole)} of {len(own)}",
            ]
            + [f"{len(best)} of {len(even)}"]
        )
    header = ["budget", "choosing <= 5 % of the unpatched prefill (projector strategies)"]
    header += [
        f"LLM: measured >= {GOAL_KEPT} x promised",
        f"whole prefill: measured >= {GOAL_KEPT} x promised",
    ]
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
            body.append(
                [name, "all" if name.startswith("transformers") else str(part["about"]["kept"]), words]
            )
    return markdown(["contestant", "kept tokens", "median"], body)


def encoders() -> str:
    """Speed of merging inside encoders."""
    report = json.loads((RESULTS / "encoders.json").read_text(encoding="utf-8"))
    body = []
    for name, c in report["cases"].items():
        figures = [f"{c[k]:.2f}" for k in ("promise", "speed-up", "speed-up / promise")]
        published = f"{c['published / tome']:.2f}" if "published / tome" in c else "-"
        body.append([name, str(c["batch"]), *figures, f"{c['cost of merging']:.1%}", published])
    header = ["encoder", "batch", "promised by the multiply-adds", "measured", "measured / promised"]
    header += ["cost of merging", "published code / vtoken"]
    where = _where(report["machine"] | {"clock": report["clock"]})
    return f"{where}, {report['dtype']}.\n\n{markdown(header, body)}"


def serving() -> str:
    """vtoken in vLLM against plain vLLM."""
    report = json.loads((RESULTS / "serving_cpu.json").read_text(encoding="utf-8"))
    m, body = report["machine"], []
    for name, contestants in report["models"].items():
        for label, row in contestants.items():
            ratios = [
                f"{row[f'{key}, ratio']:.2f}" for key in ("requests/s", "requests per processor second")
            ]
            first = f"{row['first token s p50']:.1f} / {row['first token s p95']:.1f}"
            figures = [f"{row['prompt tokens']:.0f}", *ratios, first, f"{row['KV blocks']:.0f}"]
            body.append([name, label, *figures])
    header = ["model", "", "prompt tokens", "requests/s, ratio", "requests per processor second, ratio"]
    header += ["first token, s, p50 / p95", "KV blocks"]
    told = ", ".join(
        f"{name} {a['requests']} requests at once in {a['turns']} turns"
        for name, a in report["about"].items()
    )
    where = f"{m['device']}, {m['threads']} thread(s), torch {m['torch']}, float32, random weights"
    return f"{where}; {told}.\n\n{markdown(header, body)}"


def streaming() -> str:
    """Cost of a frame and of a question, by shape and contestant; a number for each length of the stream."""
    return "\n\n".join(
        _stream(json.loads(file.read_text("utf-8"))) for file in sorted(RESULTS.glob("streaming_*.json"))
    )


def _stream(report: dict[str, Any]) -> str:
    about, m = report.pop("about"), report.pop("machine")
    lengths = [row["frames"] for row in next(iter(report.values()))]

    def each(found: list[dict[str, Any]], write: Callable[[dict[str, Any]], str]) -> str:
        written = [write(row) for row in found]
        return written[0] if len(set(written)) == 1 else " / ".join(written)

    body = []
    for name, found in report.items():
        frame = ["when asked", "when asked"]
        if "frame_ms" in found[0]:
            frame = [each(found, lambda r: f"{r['frame_ms']['median']:.0f}")]
            frame += [each(found, lambda r: f"{r['frame_flops'] / 1e9:.3g}")]
        wait = each(found, lambda r: f"{r['first_token_s']['median']:.2f}" if r["first_token_s"] else "-")
        read = each(found, lambda r: f"{r.get('prompt_tokens', '-')}")
        held = each(found, lambda r: f"{r['memory_bytes'] / 2**20:.2f}" if "memory_bytes" in r else "-")
        body.append([name, *frame, wait, read, held])
    header = [
        "",
        "ms per frame",
        "GFLOP per frame",
        "seconds to the first token",
        "tokens read",
        "memory in MiB",
    ]
    told = ", ".join(f"{n:,}" for n in lengths)
    return (
        f"LLaVA-OneVision, {about['shape']}, after {told} frames of {about['tokens_per_frame']} visual "
        f"tokens; a memory of {about['max_tokens']} tokens; {_where(m)}.\n\n{markdown(header, body)}"
    )


def early_facts() -> str:
    """Right answers about what only the first half of a clip shows, by memory; a table per model."""
    files = sorted(RESULTS.glob("early_facts*.json"))
    return "\n\n".join(_early_facts(json.loads(file.read_text(encoding="utf-8"))) for file in files)


def _early_facts(report: dict[str, Any]) -> str:
    about = report["about"]
    body = [
        [name, str(row["visual_tokens"]), f"{row['right']} of {row['n']}", f"{100 * row['rate']:.1f} %"]
        for name, row in report["memories"].items()
    ]
    told = (
        f"{about['model']}, clips of {about['frames']} frames, {about['n']} questions, seed {about['seed']}."
    )
    return f"{told}\n\n{markdown(['memory', 'visual tokens', 'right', 'rate'], body)}"


def video() -> str:
    """Seconds of every stage from a video file to an answer, and speed-ups over plain transformers."""
    stages = ("read", "process", "tower", "choose", "prefill", "decode", "total")
    parts = []
    for file in sorted(RESULTS.glob("video_cpu*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        about = report["about"]
        for model in about["models"]:
            body = [
                [r["clip"], r["row"], str(r.get("visual_tokens", "all"))]
                + [f"{r['seconds'][stage]:.2f}" for stage in stages]
                + [f"{r['speed']:.2f}"]
                for r in report["rows"]
                if r["model"] == model
            ]
            height, width = about["size"]
            clip = f"{about['seconds']:g} s of {width} x {height} at {about['fps']} per second"
            where = _where(report["machine"] | {"clock": about["clock"]})
            told = (
                f"**{model}**, {about['scale']} scale, {about['frames'][0]} frames of {clip},"
                f" {about['steps']} new tokens, budget {about['budget']}; {where}."
            )
            header = ["clip", "way", "visual tokens", *stages, "times as fast"]
            parts += [f"{told}\n\n{markdown(header, body)}"]
    return "\n\n".join(parts)


def video_answers() -> str:
    """Right answers about clips of the boards, read from files."""
    report = json.loads((RESULTS / "video_answers.json").read_text(encoding="utf-8"))
    about, rows = report["about"], report["rows"]
    body = [
        [r["model"], r["row"], f"{r.get('visual_tokens', 'all')}", f"{r.get('computed', 1):.0%}"]
        + [f"{r['right']} of {r['asked']}", f"{r['right'] / r['asked']:.1%}"]
        for r in rows
    ]
    versions = ", ".join(f"{name} {report['machine'][name]}" for name in ("torch", "transformers"))
    told = f"Budget {about['budget']}, H.264 at crf {about['crf']}; {versions}."
    header = ["tiny model", "way", "visual tokens", "tower tokens computed", "right", "rate"]
    return f"{told}\n\n{markdown(header, body)}"


def cache() -> str:
    """Bytes of the KV cache, and times per token of an answer."""
    report = json.loads((RESULTS / "cache_cpu.json").read_text(encoding="utf-8"))
    about, m, found = report["about"], report["machine"], report["rows"]
    lengths = list(dict.fromkeys(r["tokens"] for r in found))

    def cells(row: str) -> list[str]:
        of = {r["tokens"]: r for r in found if r["row"] == row}
        fewer = [f"{of[n]['times_fewer_bytes']:.1f}" for n in lengths]
        return [*fewer, *(f"{of[n]['ms_per_token']:.1f} ({of[n]['speed']['median']:.2f})" for n in lengths)]

    body = [[row, *cells(row)] for row in dict.fromkeys(r["row"] for r in found)]
    header = ["", *(f"times fewer bytes, {n}" for n in lengths)]
    header += [f"ms per token, {n} (times as fast)" for n in lengths]
    told = f"{about['scale']} scale, {about['dtype']}, batch 1; {_where(m | {'clock': about['clock']})}."
    return f"{told}\n\n{markdown(header, body)}"


def cache_answers() -> str:
    """Right answers that were read from the caches, a table per model."""
    report = json.loads((RESULTS / "cache_answers.json").read_text(encoding="utf-8"))
    about, parts = report["about"], []
    for model in dict.fromkeys(r["model"] for r in report["rows"]):
        found = [r for r in report["rows"] if r["model"] == model]
        body = [
            [
                r["row"],
                f"{r.get('times_fewer_bytes', 1):.1f}",
                *(f"{r[way]:.1%}" for way in ("prompt", "after", "long")),
            ]
            for r in found
        ]
        questions, media = found[0]["asked"], about["n"]
        told = f"**{model}**, {questions} questions about {media} pictures or clips; {about['steps']} words."
        header = ["", "times fewer bytes", "right, in the prompt", "right, after", "long answers agree"]
        parts.append(f"{told}\n\n{markdown(header, body)}")
    return "\n\n".join(parts)


PAGES: dict[Path, tuple[Callable[[], str], ...]] = {
    ROOT / "docs" / "performance.md": (
        machine,
        goals,
        models,
        video,
        video_answers,
        kernels,
        peers,
        encoders,
    ),
    ROOT / "docs" / "cache.md": (cache, cache_answers),
    ROOT / "docs" / "serving.md": (serving,),
    ROOT / "docs" / "streaming.md": (streaming, early_facts),
}


def page(path: Path) -> str:
    """One of `PAGES` with fresh tables between their markers."""
    text = path.read_text(encoding="utf-8")
    for make in PAGES[path]:
        begin, end = f"<!-- {make.__name__} -->", f"<!-- end of {make.__name__} -->"
        pattern, fresh = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.S), make()
        text, found = pattern.subn(_constant(f"{begin}\n{fresh}\n{end}"), text)
        assert found == 1, f"{path.name} needs the markers {begin} and {end} once"
    return text


def _constant(text: str) -> Callable[[Any], str]:
    return lambda _: text


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path), encoding="utf-8")
