"""From a video file to an answer, stage by stage: plain transformers, and vtoken with each of its parts.

    python benchmarks/video.py --out benchmarks/results/video_cpu.json
    python benchmarks/video.py --scale full --device cuda --frames 32 --out benchmarks/results/gpu/video.json

Random weights of the shapes of `vtoken bench`; clips of `video_clips.py`. "plain" loads the file with
transformers' `load_video` and its default back-end, and generates with the unpatched model. Every row takes
the same frames and generates the same number of tokens; the rows of one clip are measured in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.video_utils import load_video
from video_clips import KINDS, write

import vtoken
from vtoken.asking import prompt
from vtoken.bench.processors import QUESTION, onevision, qwen2_5_vl, qwen3_vl
from vtoken.bench.report import save_run
from vtoken.bench.shapes import SHAPES
from vtoken.stage_times import now
from vtoken.video_answers import STAGES, generate_timed

MODELS = ("qwen2.5-vl-7b-video", "qwen3-vl-8b-video", "llava-onevision-7b-video")
PIXELS = {"tiny": 112**2, "cpu": 308**2, "full": 392**2}  # of a frame, at most
# name: (strategy, whether frames are scaled while they are decoded)
ROWS: dict[str, tuple[Any, bool]] = {
    "sampled decoding": (None, False),
    "scaled decoding": (None, True),
    "scaled, farcover": ("farcover", True),
    "scaled, still_patches": ("still_patches", True),
    "scaled, still_patches, farcover": (["still_patches", "farcover"], True),
}
WHOLE = "scaled, still_patches, farcover"


def plain(model: Any, processor: Any, path: Path, frames: int, steps: int, clock: str) -> dict[str, float]:
    """Seconds per stage of transformers' `load_video`, the processor and `generate`."""
    choose = partial(processor.video_processor.sample_frames, num_frames=frames, fps=None)
    start = now(None, clock)
    video, metadata = load_video(str(path), sample_indices_fn=choose)
    read = now(None, clock)
    given = dict(text=[prompt(processor, QUESTION, "video")], videos=[video], video_metadata=[metadata])
    inputs = processor(**given, do_sample_frames=False, return_tensors="pt").to(model.device, model.dtype)
    process = now(None, clock)
    options = {"min_new_tokens": steps, "max_new_tokens": steps, "do_sample": False}
    _, seconds = generate_timed(model, inputs, options, clock)
    return seconds | {"read": read - start, "process": process - read}


def ours(
    model: Any,
    processor: Any,
    path: Path,
    frames: int,
    steps: int,
    clock: Any,
    strategy: Any,
    scaled: bool,
    budget: float,
    notes: dict[str, Any],
) -> dict[str, float]:
    """Seconds per stage of `vtoken.answer`; `notes` gains the tokens that the LLM reads."""
    named = [strategy] if isinstance(strategy, str) else strategy or []
    share = budget if "farcover" in named else None
    patched: AbstractContextManager[Any] = (
        nullcontext() if strategy is None else vtoken.applied(model, strategy, budget=share)
    )
    with patched:
        out = vtoken.answer(
            *(model, processor, str(path), QUESTION),
            frames=frames,
            scaled=scaled,
            clock=clock,
            min_new_tokens=steps,
            max_new_tokens=steps,
        )
    notes["frames"], notes["prompt_tokens"] = len(out.frames), out.tokens
    if out.report is not None:
        notes["visual_tokens"] = out.report.tokens_out
    return out.seconds


def middle(times: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the stages, and of their sum."""
    out = {name: statistics.median(t[name] for t in times) for name in STAGES}
    return out | {"total": statistics.median(sum(t[name] for name in STAGES) for t in times)}


def clip_rows(calls: dict[str, Callable[[], dict[str, float]]], repeats: int) -> dict[str, dict[str, float]]:
    """Stage medians of every call, measured in turns after one turn that is not counted."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            seconds = call()
            if turn:
                times[name].append(seconds)
    return {name: middle(found) for name, found in times.items()}


def processor_of(name: str, model: Any, scale: str, frames: int) -> Any:
    if name.startswith("llava"):
        return onevision(model)
    if name.startswith("qwen3"):
        # patches of 16 pixels in place of 14: as many tokens
        return qwen3_vl(PIXELS[scale] * 16**2 // 14**2, frames)
    return qwen2_5_vl(PIXELS[scale])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=PIXELS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--frames", type=int, nargs="+", default=[32])
    parser.add_argument("--seconds", type=float, default=60, help="length of a clip")
    parser.add_argument("--fps", type=int, default=30)
    parser.add_argument("--size", type=int, nargs=2, default=[720, 1280], help="height and width")
    parser.add_argument("--steps", type=int, default=16, help="tokens of the answer")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, on a busy CPU"
    )
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {
            kind: write(Path(folder) / f"{i}.mp4", kind, a.seconds, a.fps, tuple(a.size))
            for i, kind in enumerate(a.kinds)
        }
        for name in a.models:
            model = SHAPES[name].build(name, a.scale, a.device).model
            for kind, path in files.items():
                for frames in a.frames:
                    processor = processor_of(name, model, a.scale, frames)
                    notes: dict[str, dict[str, Any]] = {row: {} for row in a.rows}
                    common = (model, processor, path, frames, a.steps, a.clock)
                    calls = {"plain": partial(plain, *common)} | {
                        row: partial(ours, *common, *ROWS[row], a.budget, notes[row]) for row in a.rows
                    }
                    found = clip_rows(calls, a.repeats)
                    for row, seconds in found.items():
                        speed = found["plain"]["total"] / seconds["total"]
                        about = {"model": name, "clip": kind, "frames": frames, "row": row}
                        rows.append(about | notes.get(row, {}) | {"seconds": seconds, "speed": speed})
                        print(json.dumps(rows[-1]), flush=True)
    save_run(a, torch.device(a.device), rows=rows)


if __name__ == "__main__":
    main()
