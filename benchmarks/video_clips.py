"""Generated H.264 clips of three kinds, for benchmarks: nothing is downloaded.

"talking head": a still photograph in which one region moves, and slight noise of the sensor in that region.
"hand-held": the camera shakes and pans over a photograph, with noise in every frame.
"slides": a page that stands for twenty seconds, then another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = ("talking head", "hand-held", "slides")
NOISE, SLIDE = 2, 20  # grey levels; seconds


def _photograph(which: int, size: tuple[int, int]) -> np.ndarray:
    from vtoken.tiny.scenes import FILE

    with np.load(FILE) as file:
        pixels = file["photographs_test"]
    return np.asarray(
        Image.fromarray(pixels[which % len(pixels)]).resize(size[::-1], Image.Resampling.BICUBIC)
    )


def _page(number: int, size: tuple[int, int]) -> np.ndarray:
    from vtoken.tiny.pages import make_page

    page = make_page(number, "test").image
    return np.asarray(page.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC))


def frames(kind: str, count: int, fps: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """`count` frames (height, width, 3) uint8 of a kind in `KINDS`; `size` is (height, width)."""
    rng, (h, w) = np.random.default_rng(KINDS.index(kind)), size
    still = _photograph(0, (h, w))
    wide = _photograph(1, (h + h // 4, w + w // 4))
    top, left, part = h // 4, w // 3, (h // 2, w // 3)
    head = _photograph(2, (part[0] + 16, part[1] + 16))
    for i in range(count):
        if kind == "slides":
            if i % (SLIDE * fps) == 0:
                page = _page(i // (SLIDE * fps), size)
            yield page
            continue
        angle = 2 * math.pi * i / fps
        if kind == "talking head":
            y, x = round(8 + 8 * math.sin(angle)), round(8 + 8 * math.cos(0.7 * angle))
            image = still.copy()
            image[top : top + part[0], left : left + part[1]] = _noisy(
                head[y : y + part[0], x : x + part[1]], rng
            )
            yield image
            continue
        y = round(h / 8 * (1 + math.sin(0.5 * angle) * 0.7 + 0.2 * math.sin(5.1 * angle)))
        x = round(w / 8 * (1 + math.cos(0.3 * angle) * 0.7 + 0.2 * math.cos(4.3 * angle)))
        yield _noisy(wide[y : y + h, x : x + w], rng)


def _noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.integers(-NOISE, NOISE + 1, image.shape, dtype=np.int16)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def write(path: Path, kind: str, seconds: float, fps: int, size: tuple[int, int]) -> Path:
    """Encode a clip with a key frame every two seconds, as cameras and platforms do."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "23"})
        stream.height, stream.width = size
        stream.pix_fmt, stream.gop_size = "yuv420p", 2 * fps
        for image in frames(kind, round(seconds * fps), fps, size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path
