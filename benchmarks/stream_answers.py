"""Share of right answers about a long labelled stream, by frames so far, question, memory and strategy.

    python benchmarks/stream_answers.py --out docs/stream_answers.json

At every checkpoint a session is asked about the frames that its memory holds: an answer counts as right if it
is the one that these frames show, whatever was shown before them. A memory without bound holds all. "taught"
leaves out counts of fewer digits than any clip of the model's training has (two); "open" leaves out answers
that can be guessed ("none", "yes", "no") as well.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import vtoken
from vtoken.bench.report import machine
from vtoken.cli.stream import TINY, TINY_STEPS, make_session
from vtoken.tiny import load
from vtoken.tiny.clips import KINDS, Stream

TRIVIAL = ("none", "yes", "no")
UNTAUGHT = ("zero", "one")  # digits in a clip


def chosen(stream: Stream, now: float, since: float, per_kind: int, rng: np.random.Generator) -> list[Any]:
    """Up to `per_kind` questions of each kind with an answer in the frames from `since` to `now`."""
    by_kind = defaultdict(list)
    for question in stream.questions_at(now, since=since):
        by_kind[question.kind].append(question)
    return [q for kind in KINDS for q in rng.permutation(np.array(by_kind[kind], object))[:per_kind]]


def measure(
    session: vtoken.StreamSession, seed: int, frames: list[int], per_kind: int
) -> list[dict[str, Any]]:
    """One row per question about one stream."""
    stream, rows, rng = Stream(seed), [], np.random.default_rng(seed)
    session.reset()
    for index in range(max(frames)):
        frame = stream.frame(index)
        session.push(frame.image, frame.seconds)
        if index + 1 not in frames:
            continue
        since = session.stats["first"]
        for question in chosen(stream, frame.seconds, since, per_kind, rng):
            answer = session.ask(question.text, do_sample=False, max_new_tokens=6)
            right = answer.text == question.answer
            rows.append(dict(frames=index + 1, kind=question.kind, answer=question.answer, right=right))
    return rows


def rate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    right = sum(r["right"] for r in rows)
    return {"right": right, "n": len(rows), "rate": round(right / len(rows), 4) if rows else None}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates of all rows and of the taught ones, at each checkpoint and for each kind."""
    taught = [r for r in rows if r["answer"] not in UNTAUGHT]
    guessed = [r for r in taught if r["answer"] not in TRIVIAL]

    def at(rows: list[dict[str, Any]], key: str, values: Any) -> dict[str, Any]:
        return {str(value): rate([r for r in rows if r[key] == value]) for value in values}

    frames = sorted({r["frames"] for r in rows})
    out = {"all": rate(rows), "taught": rate(taught), "open": rate(guessed)}
    out |= {
        f"{name} by frames": at(chosen, "frames", frames)
        for name, chosen in (("taught", taught), ("open", guessed))
    }
    return out | {"taught by kind": at(taught, "kind", KINDS), "all by kind": at(rows, "kind", KINDS)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=TINY, help="a shipped tiny model that reads videos")
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--seed", type=int, default=100, help="of the first stream")
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[10, 20, 40, 60, 80, 100], help="when to ask"
    )
    parser.add_argument("--per-kind", type=int, default=2, help="questions of each kind, each time")
    parser.add_argument("--strategies", nargs="+", default=["none", "stc_pruner", "stc"])
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[TINY_STEPS, 0], help="steps in memory; 0 for no bound"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model, processor = load(arguments.model)
    results, began = {}, time.perf_counter()
    for steps in arguments.steps:
        for strategy in arguments.strategies:
            name = f"{strategy}, " + (f"the latest {steps} steps" if steps else "no bound")
            rows: list[dict[str, Any]] = []
            with make_session(
                model, processor, strategy, arguments.budget, max_steps=steps or None
            ) as session:
                for seed in range(arguments.seed, arguments.seed + arguments.streams):
                    rows += measure(session, seed, arguments.frames, arguments.per_kind)
            results[name] = summary(rows)
            for key in ("taught by frames", "open by frames", "taught by kind"):
                shown = {k: v["rate"] for k, v in results[name][key].items()}
                print(f"{name}: {key}: {shown}, {time.perf_counter() - began:.0f} s", flush=True)
    facts = {k: v for k, v in vars(arguments).items() if k != "out"}
    if arguments.out:
        report = {"about": facts, "machine": machine(model.device), "memories": results}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
