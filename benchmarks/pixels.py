"""Answers, computed tokens and tower time of the strategies that choose on the pixels.

    python benchmarks/pixels.py answers --strategy still_patches --model qwen2_5_vl --n 200
    python benchmarks/pixels.py answers --strategy blank_patches --model llava_pages --n 200
    python benchmarks/pixels.py time --strategy still_patches --shape qwen2.5-vl-7b-video

`answers` asks a tiny model about examples of the training split under several options: clips for
`still_patches`, pages with camera noise or scenes for `blank_patches`. `time` measures the vision tower of a
random model, in turns with the unpatched tower, on frames of which a square changes from one to the next
(`still_patches`) or blank around a square of content (`blank_patches`); processor time of one CPU thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vtoken
from vtoken.bench.report import save_run
from vtoken.bench.shapes import SHAPES
from vtoken.tiny import clips, load, pages, scenes, scenes_wide
from vtoken.tiny.questions import LENGTHS, answers, score
from vtoken.tiny.scenes import balanced

SIZES = {"qwen2.5-vl-7b-video": (8, 28, 28), "llava-onevision-7b-video": (8, 27)}
TOWERS = {"qwen2.5-vl-7b-video": (512, 1368, 8, 8), "llava-onevision-7b-video": (512, 2048, 8, 8)}
PARTS = {"nothing": 0.0, "1/16 of the frame": 0.25, "1/4 of the frame": 0.5, "the whole frame": 1.0}
FIRST = 50_000_000  # the first example, far from those that a model was trained on
NOISE = 2  # levels
Pair = tuple[Any, Any]


def about_clips(name: str, n: int) -> list[Pair]:
    """Questions about `n` clips of the training split."""

    def example(i: int) -> clips.Clip:
        kinds = len(clips.KINDS)
        return clips.make_clip(FIRST + i, "train", LENGTHS[i // kinds % len(LENGTHS)])

    return balanced(n, 0, (5,), clips.KINDS, example, clips.questions)


def noisy_page(i: int) -> pages.Page:
    """A page of the training split, every value off by up to `NOISE` levels."""
    page = pages.make_page(FIRST + i, "train")
    noise = np.random.Generator(np.random.PCG64([i, 7])).integers(-NOISE, NOISE + 1, (pages.SIDE,) * 2 + (3,))
    return replace(
        page, image=Image.fromarray((np.asarray(page.image) + noise).clip(0, 255).astype(np.uint8))
    )


def about_pictures(name: str, n: int) -> list[Pair]:
    """Questions about `n` pages or scenes of the training split, as the model was trained on."""
    if name == "llava_pages":
        return balanced(n, 0, (5,), pages.KINDS, noisy_page, pages.questions)
    make = scenes_wide.make_wide if name == "llava_next" else scenes.make_scene
    return balanced(n, 0, (5,), scenes.KINDS, lambda i: make(FIRST + i, "train"), scenes.questions)


def ask(model: Any, processor: Any, pairs: list[Pair]) -> tuple[list[str], float]:
    """Answers in the order of `pairs`, and the share of the tower's tokens that were computed."""
    said, computed, tokens = [""] * len(pairs), 0, 0
    lengths = [len(x.media) if isinstance(x.media, list) else 0 for x, _ in pairs]
    for length in sorted(set(lengths)):
        some = [i for i, mine in enumerate(lengths) if mine == length]
        for first in range(0, len(some), 50):
            batch = some[first : first + 50]
            texts = answers(model, processor, [pairs[i] for i in batch], len(batch))
            for i, text in zip(batch, texts, strict=True):
                said[i] = text
            for use in vtoken.report(model).tower.values():
                computed, tokens = computed + sum(use.recomputed), tokens + sum(use.tokens)
    return said, computed / tokens if tokens else 1.0


def moving(pixels: Tensor, grid: tuple[int, int], part: float, qwen: bool) -> Tensor:
    """Frames that equal the first but for a square of `part` of each side, new in every frame.

    Args:
        pixels: random, (frames * rows * columns * 4, values) or (1, frames, 3, height, width).
        grid: rows and columns of the places that are computed together.
    """
    first = pixels.view(-1, *grid, 4, pixels.shape[-1])[:1] if qwen else pixels[:, :1]
    return squares(pixels, first, grid, part, qwen, 1)


def printed(pixels: Tensor, grid: tuple[int, int], part: float, qwen: bool) -> Tensor:
    """Frames that are blank but for a square of `part` of each side; arguments as `moving`."""
    first = pixels.view(-1, *grid, 4, pixels.shape[-1])[:1] if qwen else pixels[:, :1]
    return squares(pixels, torch.zeros_like(first), grid, part, qwen, 0)


def squares(
    pixels: Tensor, frame: Tensor, grid: tuple[int, int], part: float, qwen: bool, start: int
) -> Tensor:
    """`frame` again and again, from frame `start` on with a square of `pixels`."""
    side = [round(part * n) for n in grid]
    if not qwen:
        out = frame.repeat(1, pixels.shape[1], 1, 1, 1)
        height, width = (n * 14 for n in side)
        out[:, start:, :, :height, :width] = pixels[:, start:, :, :height, :width]
        return out
    frames = pixels.view(-1, *grid, 4, pixels.shape[-1])
    out = frame.repeat(len(frames), 1, 1, 1, 1)
    out[start:, : side[0], : side[1]] = frames[start:, : side[0], : side[1]]
    return out.view_as(pixels)


@dataclass(frozen=True)
class Study:
    """What is asked of one strategy.

    Attributes:
        identity: options with which it is the unpatched model.
        options: of a row each.
        questions: `questions(model, n)`.
        frames: those of which `time` varies a part, see `moving`.
    """

    identity: dict[str, Any]
    options: list[dict[str, Any]]
    questions: Callable[[str, int], list[Pair]]
    frames: Callable[[Tensor, tuple[int, int], float, bool], Tensor]


STUDIES = {
    "still_patches": Study(
        dict(refresh=1),
        [dict(threshold=t) for t in (0.02, 0.05, 0.08, 0.15)] + [dict(margin=0), dict(margin=2)],
        about_clips,
        moving,
    ),
    "blank_patches": Study(
        dict(block=1),
        [dict(threshold=t) for t in (0.02, 0.05, 0.1, 0.2, 0.4)]
        + [dict(margin=0), dict(margin=2), dict(block=2), dict(block=8), dict(block=16)]
        + [dict(threshold=0.4, margin=0), dict(threshold=0.4, margin=0, block=16)],
        about_pictures,
        printed,
    ),
}


def measure_answers(strategy: str, name: str, n: int, pruned: float | None) -> list[dict[str, Any]]:
    """A row per choice of options; the first is the model with an identity for a patch.

    Args:
        pruned: budget of `farcover` behind it, None without.
    """
    model, processor = load(name)
    study, full, rows = STUDIES[strategy], None, []
    pairs = study.questions(name, n)
    for options in [study.identity, *study.options]:
        if pruned is None:
            patch = partial(vtoken.applied, model, strategy, **options)
        else:
            both = {"budget": pruned, strategy: options}
            patch = partial(vtoken.applied, model, [strategy, "farcover"], **both)
        with patch():
            said, share = ask(model, processor, pairs)
        full = said if full is None else full
        row = {"options": options, "right": score(pairs, said)["all"], "computed": round(share, 3)}
        row["as unpatched"] = sum(a == b for a, b in zip(said, full, strict=True)) / n
        print(row, flush=True)
        rows.append(row)
    return rows


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    with torch.no_grad():
        call()
    return time.process_time() - start


def measure_time(strategy: str, name: str, repeats: int) -> list[dict[str, Any]]:
    """A row per part that changes or has content: tokens computed, tower time over the unpatched one."""
    torch.set_num_threads(1)
    shape, size = replace(SHAPES[name], size={"cpu": SIZES[name]}, tower={"cpu": TOWERS[name]}), SIZES[name]
    work, rows = shape.build(name, "cpu"), []
    qwen = len(size) == 3
    grid = (size[1] // 2, size[2] // 2) if qwen else (size[1], size[1])
    given = {k: v for k, v in work.inputs.items() if k == "video_grid_thw"}
    for part_name, part in PARTS.items():
        pixels = STUDIES[strategy].frames(work.inputs["pixel_values_videos"], grid, part, qwen)

        def encode(pixels: Tensor = pixels) -> Any:
            return work.model.base_model.get_video_features(pixels, **given)

        times: dict[str, list[float]] = {"unpatched": [], "patched": []}
        for _ in range(repeats):
            times["unpatched"].append(seconds(encode))
            with vtoken.applied(work.model, strategy):
                times["patched"].append(seconds(encode))
        with vtoken.applied(work.model, strategy), vtoken.stream(work.model) as state, torch.no_grad():
            encode()
        ratio = statistics.median(times["patched"]) / statistics.median(times["unpatched"])
        row = {"part": part_name, "computed": round(state.recomputed / state.tokens, 3)}
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
    parser.add_argument("--strategy", default="still_patches", choices=sorted(STUDIES))
    parser.add_argument("--model", default="qwen2_5_vl", help="a shipped tiny model")
    parser.add_argument("--n", type=int, default=200, help="questions, each about an example of its own")
    parser.add_argument("--pruned", type=float, help="budget of farcover behind it")
    parser.add_argument("--shape", default="qwen2.5-vl-7b-video", choices=sorted(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "answers":
        rows = measure_answers(arguments.strategy, arguments.model, arguments.n, arguments.pruned)
    else:
        rows = measure_time(arguments.strategy, arguments.shape, arguments.repeats)
    save_run(arguments, torch.device("cpu"), rows=rows)


if __name__ == "__main__":
    main()
