"""Videos whose pixels hold the frame number: the reference for readers."""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np

BITS, CELL = 8, 16
SIZE = (BITS * CELL, 48)
T = TypeVar("T")


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """(height, width, 3) uint8: the number in black and white cells along the top, below them a grey that
    changes.
    """
    width, height = size
    image = np.full((height, width, 3), 40 + number * 7 % 160, np.uint8)
    for bit in range(BITS):
        image[: height // 2, bit * CELL : (bit + 1) * CELL] = 235 if number >> bit & 1 else 20
    return image


def number(image: np.ndarray) -> int:
    """The number that a picture shows."""
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.flags.c_contiguous
    height = image.shape[0]
    rows = slice(height // 8, height // 2 - height // 8)
    cells = [image[rows, bit * CELL + 4 : (bit + 1) * CELL - 4].mean() for bit in range(BITS)]
    assert all(cell < 90 or cell > 165 for cell in cells), f"not a picture with a number: {cells}"
    return sum((cell > 128) << bit for bit, cell in enumerate(cells))


def write(
    target: Any,
    frames: int | Iterable[int] = 24,
    *,
    codec: str = "libx264",
    format: str | None = None,
    pixels: str = "yuv420p",
    fps: int = 25,
    times: Sequence[int] | None = None,
    base: Fraction | None = None,
    size: tuple[int, int] = SIZE,
    group: int = 8,
    between: int = 2,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    audio: str | None = None,
    video: bool = True,
) -> Any:
    """Encode numbered pictures; `times` are their pts in units of `base` (frame durations if not given)."""
    numbers = range(frames) if isinstance(frames, int) else frames
    base = base or Fraction(1, fps)
    with av.open(
        str(target) if isinstance(target, Path) else target, "w", format=format, options=container or {}
    ) as out:
        sound = out.add_stream(audio, rate=16000) if audio else None
        if video:
            stream = out.add_stream(codec, rate=fps, options=options or {})
            stream.width, stream.height, stream.pix_fmt = *size, pixels
            stream.codec_context.time_base = base
            stream.codec_context.gop_size = group
            if codec in ("libx264", "mpeg4", "mpeg2video"):
                stream.codec_context.max_b_frames = between
            if rotation:
                stream.set_display_rotation(rotation)
            for place, i in enumerate(numbers):
                frame = av.VideoFrame.from_ndarray(picture(i, size), format="rgb24").reformat(format=pixels)
                frame.pts, frame.time_base = times[place] if times else place, base
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        if sound is not None:
            for place in range(len(numbers)):
                tone = av.AudioFrame.from_ndarray(np.zeros((1, 640), np.int16), format="s16", layout="mono")
                tone.sample_rate, tone.pts = 16000, place * 640
                out.mux(sound.encode(tone))
            out.mux(sound.encode(None))
    return target


def in_time(work: Callable[[], T], seconds: float = 30.0) -> T:
    """What `work` returns or raises; the test fails where it takes longer, because it hangs."""
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result["value"] = work()
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        faulthandler.dump_traceback()
        raise AssertionError(f"it hangs: no end after {seconds:g} s")
    if "error" in result:
        raise result["error"]
    return result["value"]
