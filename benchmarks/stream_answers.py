"""Share of right answers about a long labelled stream, by frames so far, question, memory and strategy.

    python benchmarks/stream_answers.py --out docs/stream_answers.json

At every checkpoint a session is asked about the frames that its memory holds: an answer counts as right if it
is the one that these frames show, whatever was shown before them. A memory without bound holds all. "open"
leaves out answers that are easily guessed ("none", "yes", "no", "zero", "one"); "examples" are the questions
that the demo proposes, asked as well each time.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import vtoken
from vtoken.bench.report import save_run
from vtoken.cli.stream import EXAMPLES, TINY, TINY_STEPS, make_session
from vtoken.tiny import load
from vtoken.tiny.clips import KINDS, Stream
from vtoken.tiny.scenes import Question

TRIVIAL = ("none", "yes", "no", "zero", "one")
EXAMPLE = "example"  # the kind of questions that the demo proposes


def chosen(stream: Stream, now: float, since: float, per_kind: int, rng: np.random.Generator) -> list[Any]:
    """Up to `per_kind` questions of each kind that the frames since `since` answer, and the demo's."""
    by_kind = defaultdict(list)
    for question in stream.questions_at(now, since=since):
        by_kind[question.kind].append(question)
    drawn = [q for kind in KINDS for q in rng.permutation(np.array(by_kind[kind], object))[:per_kind]]
    told = ((text, stream.answer_to(text, now, since)) for text in EXAMPLES)
    return drawn + [Question(text, answer, EXAMPLE) for text, answer in told if answer is not None]


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
    """Rates of drawn questions, of those hard to guess and of the demo's, by checkpoint and kind."""
    drawn = [r for r in rows if r["kind"] != EXAMPLE]
    sets = {"all": drawn, "open": [r for r in drawn if r["answer"] not in TRIVIAL]}
    sets["examples"] = [r for r in rows if r["kind"] == EXAMPLE]
    frames, counts = sorted({r["frames"] for r in rows}), ("zero", "one", "two", "three", "four")

    def at(rows: list[dict[str, Any]], key: str, values: Any) -> dict[str, Any]:
        return {str(value): rate([r for r in rows if r[key] == value]) for value in values}

    out: dict[str, Any] = {name: rate(some) for name, some in sets.items()}
    out |= {f"{name} by frames": at(some, "frames", frames) for name, some in sets.items()}
    out["all by kind"] = at(drawn, "kind", KINDS)
    return out | {"digits by answer": at([r for r in drawn if r["kind"] == "digits"], "answer", counts)}


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
            for key in ("all by frames", "examples by frames", "all by kind", "digits by answer"):
                shown = {k: v["rate"] for k, v in results[name][key].items()}
                print(f"{name}: {key}: {shown}, {time.perf_counter() - began:.0f} s", flush=True)
    save_run(arguments, model.device, memories=results)


if __name__ == "__main__":
    main()
