"""Plain resizing at the tokens of a budget, on the tiny Qwen2.5-VL: the baseline of docs/board-trained.md.

    python benchmarks/resized_board.py --output docs/board-trained/resized.json

Pictures and frames are made smaller before the processor sees them, which no longer enlarges them. The
other tiny models read pictures in tiles of one size: a smaller picture makes no fewer tokens there.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from vtoken import tiny
from vtoken.eval.board.board import versions
from vtoken.tiny.questions import answers, held_out, score

NAME, CELL = "qwen2_5_vl", 16  # px along the side of a visual token
BUDGETS = (0.25, 0.125, 0.0625)


class Smaller:
    """A held-out example whose picture, or every frame, has `side` cells along each side."""

    def __init__(self, example: Any, side: int) -> None:
        self.seconds = getattr(example, "seconds", ())
        frames = example.media if isinstance(example.media, list) else [example.media]
        made = [frame.resize((side * CELL, side * CELL), Image.Resampling.BICUBIC) for frame in frames]
        self.media = made if isinstance(example.media, list) else made[0]


def measure(questions: int, seed: int) -> list[dict[str, Any]]:
    """Accuracy and tokens per medium and budget."""
    model, processor = tiny.load(NAME)
    for part in (processor.image_processor, processor.video_processor):
        part.size = {"shortest_edge": CELL * CELL, "longest_edge": 64 * 64 * CELL * CELL}
    rows = []
    pairs = held_out(NAME, questions, seed)
    for medium in ("image", "video"):
        mine = [p for p in pairs if isinstance(p[0].media, list) == (medium == "video")]
        for budget in BUDGETS:
            side = max(1, math.isqrt(int((100 if medium == "image" else 36) * budget)))
            smaller = [(Smaller(example, side), question) for example, question in mine]
            counted: list[float] = []

            def count(inputs: Any, counted: list[float] = counted, medium: str = medium) -> None:
                token = getattr(model.config, f"{medium}_token_id")
                counted.extend((inputs["input_ids"] == token).sum(1).tolist())

            said = answers(model, processor, smaller, change=count)
            right = score(smaller, said)["all"]
            rows.append(
                {
                    "medium": medium,
                    "budget": budget,
                    "questions": len(mine),
                    "right": right,
                    "tokens": sum(counted) / len(counted),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=1000, help="half about images, half about clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="resized.json")
    a = parser.parse_args()
    report = {"model": NAME, "seed": a.seed, **versions(), "rows": measure(a.questions, a.seed)}
    Path(a.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
