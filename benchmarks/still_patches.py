"""Answers, computed tokens and tower time of `still_patches`.

    python benchmarks/still_patches.py answers --model qwen2_5_vl --n 200
    python benchmarks/still_patches.py time --shape qwen2.5-vl-7b-video

`answers` asks a tiny model about clips of the training split under several options. `time` measures the
vision tower of a random model on frames of which a square changes from one to the next, in turns with the
unpatched tower; processor time of one thread on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtoken
from vtoken.bench.report import machine
from vtoken.bench.shapes import SHAPES
from vtoken.tiny import clips, load
from vtoken.tiny.questions import LENGTHS, answers, score
from vtoken.tiny.scenes import balanced

OPTIONS = [
    dict(threshold=0.02),
    dict(threshold=0.05),
    dict(threshold=0.08),
    dict(threshold=0.15),
    dict(threshold=0.05, margin=0),
    dict(threshold=0.05, margin=2),
]
SIZES = {"qwen2.5-vl-7b-video": (8, 28, 28), "llava-onevision-7b-video": (8, 27)}
TOWERS = {"qwen2.5-vl-7b-video": (512, 1368, 8, 8), "llava-onevision-7b-video": (512, 2048, 8, 8)}
CHANGED = {"nothing": 0.0, "1/16 of the frame": 0.25, "1/4 of the frame": 0.5, "the whole frame": 1.0}
CLIPS = 50_000_000  # the first clip, far from those that a model was trained on


def questions(n: int) -> list[tuple[Any, Any]]:
    """Questions about `n` clips of the training split."""

    def example(i: int) -> clips.Clip:
        kinds = len(clips.KINDS)
        return clips.make_clip(CLIPS + i, "train", LENGTHS[i // kinds % len(LENGTHS)])

    return balanced(n, 0, (5,), clips.KINDS, example, clips.questions)


def ask(model: Any, processor: Any, pairs: list[tuple[Any, Any]]) -> tuple[list[str], float]:
    """Answers in the order of `pairs`, and the share of the tower's tokens that were computed."""
    said, computed, tokens = [""] * len(pairs), 0, 0
    for length in LENGTHS:
        some = [i for i, (clip, _) in enumerate(pairs) if len(clip.media) == length]
        for first in range(0, len(some), 50):
            batch = some[first : first + 50]
            texts = answers(model, processor, [pairs[i] for i in batch], len(batch))
            for i, text in zip(batch, texts, strict=True):
                said[i] = text
            use = vtoken.report(model).tower.get("video")
            computed += 0 if use is None else sum(use.recomputed)
            tokens += 0 if use is None else sum(use.tokens)
    return said, computed / tokens if tokens else 1.0


def measure_answers(name: str, n: int) -> list[dict[str, Any]]:
    """A row per choice of options; the first is the model with an identity for a patch."""
    model, processor = load(name)
    pairs, full, rows = questions(n), None, []
    for options in [dict(refresh=1), *OPTIONS]:
        with vtoken.applied(model, "still_patches", **options):
            said, share = ask(model, processor, pairs)
        full = said if full is None else full
        row = {"options": options, "right": score(pairs, said)["all"], "computed": round(share, 3)}
        row["as unpatched"] = sum(a == b for a, b in zip(said, full, strict=True)) / n
        print(row, flush=True)
        rows.append(row)
    return rows


def moving(pixels: Tensor, grid: tuple[int, int], part: float, qwen: bool) -> Tensor:
    """Frames that equal the first but for a square of `part` of each side, new in every frame.

    Args:
        pixels: random, (frames * rows * columns * 4, values) or (1, frames, 3, height, width).
        grid: rows and columns of the places that are computed together.
    """
    side = [round(part * n) for n in grid]
    if not qwen:
        out = pixels[:, :1].repeat(1, pixels.shape[1], 1, 1, 1)
        height, width = (n * 14 for n in side)
        out[:, 1:, :, :height, :width] = pixels[:, 1:, :, :height, :width]
        return out
    frames = pixels.view(-1, *grid, 4, pixels.shape[-1])
    out = frames[:1].repeat(len(frames), 1, 1, 1, 1)
    out[1:, : side[0], : side[1]] = frames[1:, : side[0], : side[1]]
    return out.view_as(pixels)


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    with torch.no_grad():
        call()
    return time.process_time() - start


def measure_time(name: str, repeats: int) -> list[dict[str, Any]]:
    """A row per part of the frame that changes: tokens computed, and the tower's time over the unpatched."""
    torch.set_num_threads(1)
    shape, size = replace(SHAPES[name], size={"cpu": SIZES[name]}, tower={"cpu": TOWERS[name]}), SIZES[name]
    work, rows = shape.build(name, "cpu"), []
    qwen = len(size) == 3
    grid = (size[1] // 2, size[2] // 2) if qwen else (size[1], size[1])
    given = {k: v for k, v in work.inputs.items() if k == "video_grid_thw"}
    for changed, part in CHANGED.items():
        pixels = moving(work.inputs["pixel_values_videos"], grid, part, qwen)

        def encode(pixels: Tensor = pixels) -> Any:
            return work.model.base_model.get_video_features(pixels, **given)

        times: dict[str, list[float]] = {"unpatched": [], "patched": []}
        for _ in range(repeats):
            times["unpatched"].append(seconds(encode))
            with vtoken.applied(work.model, "still_patches"):
                times["patched"].append(seconds(encode))
        with vtoken.applied(work.model, "still_patches"), vtoken.stream(work.model) as state, torch.no_grad():
            encode()
        ratio = statistics.median(times["patched"]) / statistics.median(times["unpatched"])
        row = {"changed": changed, "computed": round(state.recomputed / state.tokens, 3)}
        row |= {"flops": round(state.flops / state.flops_dense, 3), "time": round(ratio, 3)}
        row["unpatched seconds"] = round(statistics.median(times["unpatched"]), 2)
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["answers", "time"])
    parser.add_argument("--model", default="qwen2_5_vl", help="a shipped tiny model that reads videos")
    parser.add_argument("--n", type=int, default=200, help="questions, each about a clip of its own")
    parser.add_argument("--shape", default="qwen2.5-vl-7b-video", choices=sorted(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "answers":
        rows = measure_answers(arguments.model, arguments.n)
    else:
        rows = measure_time(arguments.shape, arguments.repeats)
    if arguments.out:
        facts = {k: v for k, v in vars(arguments).items() if k != "out"}
        report = {"about": facts, "machine": machine(torch.device("cpu")), "rows": rows}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
