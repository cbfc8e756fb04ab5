"""Accuracy on facts shown only early in a stream, with several memories and with all frames.

    python benchmarks/early_facts.py --model qwen2_5_vl --n 200 --out benchmarks/results/early_facts.json

Clips of the held-out split; the questions are those with a final answer in the first half of a clip. Every
memory is asked the same questions about the same frames at the clip's end, which all fit the model's
positions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import vtoken
from vtoken.bench.report import save_run
from vtoken.tiny import clips, load
from vtoken.tiny.questions import answers


def questions(n: int, frames: int, seed: int) -> list[tuple[Any, Any]]:
    """(clip, question) pairs about the first half of a clip, one per clip, final after that half."""
    rng, found, number = np.random.default_rng(seed), [], 0
    while len(found) < n:
        clip = clips.make_clip(seed * 1_000_000 + number, "test", frames)
        early = clips.questions(clip, seen_before=frames / clip.fps / 2)
        if early:
            found.append((clip, early[int(rng.integers(len(early)))]))
        number += 1
    return found


def memories(model: Any, tokens: int, pruner: str, budget: float) -> dict[str, dict[str, Any]]:
    """Sessions by name; `tokens` are the visual tokens of a whole clip."""
    half, quarter = tokens // 2, tokens // 4
    pruned = dict(strategy=pruner, budget=budget)
    retrieval = dict(memory="rekv", memory_options={"n_local": quarter, "topk": 4})
    rekv = {} if hasattr(model.base_model, "get_rope_index") else {"rekv, 4 frames retrieved": retrieval}
    return {
        "default": {},
        "half of the tokens": dict(max_tokens=half, memory_options={"recent": 2}),
        "a quarter of the tokens": dict(max_tokens=quarter, memory_options={"recent": 1}),
        f"{pruner}, budget {budget}": pruned,
        f"{pruner}, budget {budget}, half of those tokens": pruned
        | dict(max_tokens=int(half * budget), memory_options={"recent": 2}),
        "only the latest 4 frames": dict(frames=4),
        "only the latest half": dict(max_tokens=half, memory_options={"recent": 10**6, "sinks": 0}),
    } | rekv


def ask(
    model: Any, processor: Any, pairs: list[tuple[Any, Any]], options: dict[str, Any]
) -> tuple[list[str], int]:
    """The session's answers, and the largest number of visual tokens that one of them has read."""
    said, most = [], 0
    with vtoken.StreamSession(model, processor, max_new_tokens=6, **options) as session:
        for clip, question in pairs:
            session.reset()
            for frame, t in zip(clip.media, clip.seconds, strict=True):
                session.push(frame, t)
            answer = session.ask(question.text, do_sample=False)
            said.append(answer.text)
            most = max(most, answer.visual_tokens)
    return said, most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2_5_vl", help="a shipped tiny model that reads videos")
    parser.add_argument("--n", type=int, default=200, help="questions, each about a clip of its own")
    parser.add_argument("--frames", type=int, default=16, help="of a clip")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--strategy", default="stc_pruner")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--only", nargs="*", help="which memories, all if left out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model, processor = load(arguments.model)
    pairs = questions(arguments.n, arguments.frames, arguments.seed)
    truth = [question.answer for _, question in pairs]

    def row(said: list[str], tokens: int | None) -> dict[str, Any]:
        right = sum(a == b for a, b in zip(said, truth, strict=True))
        return {
            "right": right,
            "n": len(truth),
            "rate": round(right / len(truth), 4),
            "visual_tokens": tokens,
        }

    began = time.perf_counter()
    rows = {"all frames": row(answers(model, processor, pairs, 20), None)}
    first, _ = pairs[0]
    tokens = ask(model, processor, [(first, pairs[0][1])], {})[1]
    rows["all frames"]["visual_tokens"] = tokens
    print("all frames", rows["all frames"], flush=True)
    for name, options in memories(model, tokens, arguments.strategy, arguments.budget).items():
        if arguments.only and name not in arguments.only:
            continue
        rows[name] = row(*ask(model, processor, pairs, options))
        print(name, rows[name], f"{time.perf_counter() - began:.0f} s", flush=True)
    save_run(arguments, model.device, memories=rows)


if __name__ == "__main__":
    main()
