"""Answers about video files by the shipped models: all visual tokens, and the parts of the whole way.

    python benchmarks/video_answers.py --out benchmarks/results/video_answers.json

The clips are those of the board, encoded as H.264 files that `vtoken.answer` reads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vtoken
from vtoken.bench.report import save_run
from vtoken.tiny import load
from vtoken.tiny.questions import held_out

MODELS = ("qwen2_5_vl_long", "qwen2_5_vl", "llava_onevision")
# name: (strategies, whether frames are scaled while they are decoded)
ROWS: dict[str, tuple[Any, bool]] = {
    "all visual tokens": (None, False),
    "farcover": ("farcover", False),
    "scaled, still_patches, farcover": (["still_patches", "farcover"], True),
}


def write(path: Path, clip: Any, crf: int) -> None:
    """A file with the frames of a clip at its own rate."""
    import av

    rate = Fraction(clip.fps).limit_denominator(1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.width, stream.height = clip.media[0].size
        stream.pix_fmt = "yuv420p"
        for image in clip.media:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")))
        container.mux(stream.encode())


def ask(model: Any, processor: Any, path: Path, question: str, row: str, budget: float) -> Any:
    """The answer of one row."""
    strategy, scaled = ROWS[row]
    patched = nullcontext() if strategy is None else vtoken.applied(model, strategy, budget=budget)
    with patched:
        return vtoken.answer(model, processor, str(path), question, scaled=scaled, max_new_tokens=8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument(
        "--n", type=int, default=500, help="questions of the board; those about images are left out"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crf", type=int, default=18, help="of x264; smaller is better")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    rows = []
    for name in a.models:
        model, processor = load(name)
        asked = [pair for pair in held_out(name, a.n, a.seed) if isinstance(pair[0].media, list)]
        found: dict[str, dict[str, int]] = {
            row: dict.fromkeys(("right", "tokens", "computed", "of"), 0) for row in ROWS
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            for clip, question in asked:
                write(path, clip, a.crf)
                for row, sums in found.items():
                    out = ask(model, processor, path, question.text, row, a.budget)
                    assert len(out.frames) == len(clip.media)
                    sums["right"] += out.text == question.answer
                    if out.report is not None:
                        sums["tokens"] += out.report.tokens_out
                        use = out.report.tower.get("video")
                        sums["computed"] += sum(use.recomputed) if use else 0
                        sums["of"] += sum(use.tokens) if use else 0
        for row, sums in found.items():
            told = {"model": name, "row": row, "asked": len(asked), "right": sums["right"]}
            if sums["of"]:
                told["computed"] = round(sums["computed"] / sums["of"], 3)
            if sums["tokens"]:
                told["visual_tokens"] = round(sums["tokens"] / len(asked), 1)
            rows.append(told)
            print(json.dumps(told), flush=True)
    save_run(a, torch.device("cpu"), rows=rows)


if __name__ == "__main__":
    main()
