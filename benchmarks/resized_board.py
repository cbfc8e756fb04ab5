"""Plain resizing at the tokens of a budget, on the tiny Qwen2.5-VL: the baseline of docs/board-trained.md.

    python benchmarks/resized_board.py --output docs/board-trained/resized.json
    python benchmarks/resized_board.py --strategy farcover --output docs/measured/resized.json

With a strategy, pictures lose a part of their cells by resizing and the rest by the strategy.

Pictures and frames are made smaller before the processor sees them, which no longer enlarges them. The
other tiny models read pictures in tiles of one size: a smaller picture makes no fewer tokens there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

import vtoken
from vtoken import tiny
from vtoken.eval.board.board import versions
from vtoken.tiny.questions import answers, held_out, score

NAME, CELL = "qwen2_5_vl", 16  # px along the side of a visual token
BUDGETS = (0.25, 0.125, 0.0625)
SIDES = {"image": 10, "video": 6}  # cells along each side


class Smaller:
    """A held-out example whose picture, or every frame, has `side` cells along each side."""

    def __init__(self, example: Any, side: int) -> None:
        self.seconds = getattr(example, "seconds", ())
        frames = example.media if isinstance(example.media, list) else [example.media]
        made = [frame.resize((side * CELL, side * CELL), Image.Resampling.BICUBIC) for frame in frames]
        self.media = made if isinstance(example.media, list) else made[0]


def ways(medium: str, budget: float, strategy: str | None) -> list[tuple[int, float]]:
    """Cells along a side, and the share of them that the strategy keeps, for `budget` of all tokens."""
    whole = SIDES[medium]
    least = max(1, math.isqrt(int(whole**2 * budget)))
    sides = range(whole, max(least, whole // 2), -1) if strategy else (least,)
    return [(side, budget * whole**2 / side**2 if strategy else 1.0) for side in sides]


def measure(questions: int, seed: int, strategy: str | None = None) -> list[dict[str, Any]]:
    """Accuracy and tokens per medium, budget and size."""
    model, processor = tiny.load(NAME)
    for part in (processor.image_processor, processor.video_processor):
        part.size = {"shortest_edge": CELL * CELL, "longest_edge": 64 * 64 * CELL * CELL}
    rows = []
    pairs = held_out(NAME, questions, seed)
    for medium in ("image", "video"):
        mine = [p for p in pairs if isinstance(p[0].media, list) == (medium == "video")]
        for budget in BUDGETS:
            for side, kept in ways(medium, budget, strategy):
                smaller = [(Smaller(example, side), question) for example, question in mine]
                right, tokens = ask(model, processor, smaller, strategy, kept)
                row = {"medium": medium, "budget": budget}
                if strategy:
                    row |= {"strategy": strategy, "pixels": side**2 / SIDES[medium] ** 2}
                rows.append({**row, "questions": len(mine), "right": right, "tokens": tokens})
                print(rows[-1], flush=True)
    return rows


def ask(model: Any, processor: Any, pairs: Any, strategy: str | None, kept: float) -> tuple[float, float]:
    """Share of right answers, and visual tokens per question that enter the LLM."""
    tokens = calls = 0

    def count(inputs: Any = None) -> None:
        """Before each call: what its inputs hold, or what the call before it read."""
        nonlocal tokens, calls
        if strategy:
            tokens += vtoken.report(model).tokens_out if calls else 0
        elif inputs is not None:
            ids = (model.config.image_token_id, model.config.video_token_id)
            tokens += sum(int((inputs["input_ids"] == token).sum()) for token in ids)
        calls += 1

    with vtoken.applied(model, strategy, budget=kept) if strategy else contextlib.nullcontext():
        said = answers(model, processor, pairs, change=count)
        count()
    return score(pairs, said)["all"], tokens / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=1000, help="half about images, half about clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", help="prunes what is left after resizing")
    parser.add_argument("--output", default="resized.json")
    a = parser.parse_args()
    report = {"model": NAME, "seed": a.seed, **versions(), "rows": measure(a.questions, a.seed, a.strategy)}
    Path(a.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
