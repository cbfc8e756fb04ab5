"""Cost of a frame and of a question in a long stream, with and without reuse and pruning.

Compared with a model that is given all frames, and with one that is given a few sampled ones.

    python benchmarks/streaming.py --shape small --out benchmarks/results/streaming_small.json
    python benchmarks/streaming.py --shape 7b --device cuda --out streaming-7b.json

Random weights; LLaVA-OneVision with 64 (small) or 196 (7b) visual tokens per frame. Plain models encode their
frames when the question comes, as they have no memory; a session has done so before. Frames that do not fit
the model's positions are not asked about, nor more than `--plain` of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import vtoken
from vtoken.bench.processors import QUESTION, onevision
from vtoken.bench.report import machine
from vtoken.bench.shapes import SHAPES
from vtoken.bench.timing import spread

Clock = Callable[[], float]
SCALE = {"tiny": "tiny", "small": "cpu", "7b": "full"}
TOKENS = {"tiny": 256, "small": 1024, "7b": 12544}  # visual tokens that a memory may hold
SESSIONS: dict[str, dict[str, Any]] = {
    "session, no strategy": {},
    "session, the latest 4 frames": dict(frames=4),
    "session, stc_cacher": dict(strategy="stc_cacher"),
    "session, stc_pruner": dict(strategy="stc_pruner", budget=0.3),
    "session, stc": dict(strategy="stc", budget=0.3),
    "session, rekv and stc": dict(strategy="stc", budget=0.3, memory="rekv"),
}
WINDOW, SCENE = 32, 30
COUNTED = 8  # frames whose FLOPs are counted, a multiple of every interval


def picture(index: int, side: int) -> np.ndarray:
    """A frame of an endless synthetic stream: a still background per scene, and a moving object on it."""
    image = np.random.default_rng(index // SCENE).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    image = image.repeat(9, 0).repeat(9, 1)[:side, :side].copy()
    at, width = 3 * index % (side - side // 8), side // 8
    image[at : at + width, at : at + width] = index * 7 % 256
    return image


def first_token(ask: Callable[[], Any], repeats: int, device: torch.device, now: Clock) -> dict[str, float]:
    """Seconds to an answer of one token by the clock `now`, as quartiles."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = now()
        ask()
        times.append(now() - start)
    return spread(times)


def plain(model: Any, processor: Any, frames: Sequence[np.ndarray]) -> int:
    """One token from the model's own `generate` about these frames; the prompt's length."""
    facts = {"total_num_frames": len(frames), "fps": 2.0, "frames_indices": list(range(len(frames)))}
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}], tokenize=False
    )
    inputs = processor(
        text=[text],
        videos=[np.stack(frames)],
        video_metadata=[facts],
        do_sample_frames=False,
        return_tensors="pt",
    ).to(model.device)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return int(inputs["input_ids"].shape[1])


def measure_session(
    model: Any,
    processor: Any,
    asked: Sequence[int],
    tokens: int,
    per_frame: int,
    repeats: int,
    now: Clock,
    **options: Any,
) -> list[dict[str, Any]]:
    """One entry per number of frames in `asked`, ascending; FLOPs per frame include rekv's LLM."""
    device, side, rows = model.device, model.config.vision_config.image_size, []
    limits: dict[str, Any] = {"max_tokens": tokens}
    if options.get("memory") == "rekv":
        limits = {"max_bytes": 2**28 if device.type == "cpu" else 2**34}
        limits["memory_options"] = {"topk": tokens // per_frame, "n_local": tokens}
    with vtoken.StreamSession(model, processor, fps=2.0, **limits, **options) as session:
        times: list[float] = []
        for index in range(max(asked)):
            frame = picture(index, side)
            if index + COUNTED in asked:
                counter = FlopCounterMode(display=False)
                counter.__enter__()
            counting = any(index < n <= index + COUNTED for n in asked)
            start = now()
            session.push(frame)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if not counting:  # counting takes time of its own
                times = [*times[1 - WINDOW :], now() - start]
            if index + 1 in asked:
                counter.__exit__(None, None, None)
                answer = session.ask(QUESTION, max_new_tokens=1)
                row = {
                    "frames": index + 1,
                    "frame_ms": {k: 1000 * v for k, v in spread(times).items()},
                    "frame_flops": counter.get_total_flops() / COUNTED,
                    "first_token_s": first_token(
                        lambda: session.ask(QUESTION, max_new_tokens=1, do_sample=False), repeats, device, now
                    ),
                    "prompt_tokens": answer.tokens,
                    "frames_used": len(answer.frames_used),
                    "memory_bytes": session.stats["bytes"],
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def measure_plain(
    model: Any, processor: Any, asked: Sequence[int], most: int, sampled: int, repeats: int, now: Clock
) -> Any:
    """Per number of frames the time to the first token from all frames, and from some sampled evenly.

    None if they do not fit.
    """
    side, out = model.config.vision_config.image_size, {"all frames": [], "sampled frames": []}
    for count in asked:
        for name, taken in (("all frames", count), ("sampled frames", min(count, sampled))):
            places = np.linspace(0, count - 1, taken).round().astype(int)
            row: dict[str, Any] = {"frames": count, "frames_used": taken, "first_token_s": None}
            if taken <= most:
                frames = [picture(int(i), side) for i in places]
                row["prompt_tokens"] = plain(model, processor, frames)
                row["first_token_s"] = first_token(
                    lambda f=frames: plain(model, processor, f), repeats, model.device, now
                )
            out[name].append(row)
            print(name, json.dumps(row), flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SCALE, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, nargs="+", default=[10, 100, 1000, 10000], help="when to ask")
    parser.add_argument("--plain", type=int, default=100, help="most frames that a plain model is given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, on a busy CPU"
    )
    parser.add_argument("--only", nargs="*", default=list(SESSIONS), help="which sessions")
    parser.add_argument("--out", type=Path, help="JSON file; entries of other runs in it stay")
    arguments = parser.parse_args()
    if min(arguments.frames) <= COUNTED:
        parser.error(f"--frames must be more than {COUNTED}")
    now = time.process_time if arguments.clock == "cpu" else time.perf_counter
    asked, tokens = sorted(arguments.frames), TOKENS[arguments.shape]
    work = SHAPES["llava-onevision-7b-video"].build(
        "llava-onevision", SCALE[arguments.shape], arguments.device
    )
    processor, vision = onevision(work.model), work.model.config.vision_config
    per_frame = (-(-vision.image_size // vision.patch_size // 2)) ** 2
    old = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    facts = {"shape": arguments.shape, "tokens_per_frame": per_frame, "max_tokens": tokens, **work.about}
    result = {
        **old,
        "about": facts,
        "machine": machine(torch.device(arguments.device)) | {"clock": arguments.clock},
    }
    for name in arguments.only:
        print(name, flush=True)
        result[name] = measure_session(
            work.model, processor, asked, tokens, per_frame, arguments.repeats, now, **SESSIONS[name]
        )
        _save(result, arguments.out)
    if arguments.plain:
        result |= measure_plain(
            work.model, processor, asked, arguments.plain, tokens // per_frame, arguments.repeats, now
        )
        _save(result, arguments.out)


def _save(result: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
