"""Builds ``assets.npz``: the photographs and glyph masks of the scenes.

Run ``python -m vtoken.tiny.assets`` to build it again (needs scikit-image and Pillow). The file ships with
the package, so that composing a scene is integer arithmetic on stored bytes and gives the same scene on every
machine.

Photographs (all from ``skimage.data``, released as CC0 or into the public domain, or without known copyright
restrictions): train - astronaut (NASA), chelsea (Stefan van der Walt), brick and grass (textures), coins
(Brooklyn Museum), hubble_deep_field (NASA), retina (Mikael Haggstrom); test - coffee (Rachel Michetti),
rocket (SpaceX), camera (Lav Varshney), gravel (texture). They are reduced to 160 x 128, half desaturated and
brought into the range 25..175.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ..extras import require

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
PHOTOGRAPHS = {
    "train": (
        "astronaut.png",
        "chelsea.png",
        "brick.png",
        "grass.png",
        "coins.png",
        "hubble_deep_field.jpg",
        "retina.jpg",
    ),
    "test": ("coffee.png", "rocket.jpg", "camera.png", "gravel.png"),
}
GLYPHS = {"train": 96, "test": 32}  # per shape
CANVAS = 24  # side of a stored mask in px
FILE = Path(__file__).with_name("assets.npz")


def outline(shape: str) -> np.ndarray:
    """Corners of a shape in the unit disc, ``(k, 2)`` float64, y downwards. ``ring``: outline of a circle."""
    turn = 2 * np.pi
    if shape in ("circle", "ring"):
        t = np.arange(40) / 40 * turn
        return 0.92 * np.stack([np.cos(t), np.sin(t)], 1)
    if shape == "square":
        return 0.85 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    if shape == "diamond":
        return np.array([[0, -1.1], [0.72, 0], [0, 1.1], [-0.72, 0]])
    if shape == "triangle":
        return np.array([[0, -1.0], [1.05, 0.85], [-1.05, 0.85]])
    if shape == "star":
        t = np.arange(10) / 10 * turn - turn / 4
        r = np.where(np.arange(10) % 2 == 0, 1.12, 0.5)
        return np.stack([r * np.cos(t), r * np.sin(t)], 1)
    if shape == "cross":
        a, b = 0.34, 1.0
        corners = [[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a]]
        return np.array(corners + [[-x, -y] for x, y in corners], float)
    if shape == "heart":
        t = np.arange(48) / 48 * turn
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x / 16, -y / 15.5], 1)
    raise ValueError(f"unknown shape {shape!r}: one of {', '.join(SHAPES)}")


def glyph(shape: str, rng: np.random.Generator) -> np.ndarray:
    """One deformed mask of ``shape``: ``(24, 24)`` uint8, 255 inside, undeformed diameter 15 to 19 px."""
    points = outline(shape)
    radius = rng.uniform(7.5, 9.5)
    aspect = rng.uniform(0.9, 1.1)
    points = points * (1 + rng.uniform(-0.05, 0.05, size=(len(points), 1))) * [aspect, 1 / aspect]
    angle = np.deg2rad(rng.uniform(-13, 13))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = points @ rotation.T
    scale = 8

    def place(p: np.ndarray) -> list[tuple[float, float]]:
        return [tuple(q) for q in (p * radius + CANVAS / 2) * scale]

    image = Image.new("L", (CANVAS * scale, CANVAS * scale))
    draw = ImageDraw.Draw(image)
    draw.polygon(place(points), fill=255)
    if shape == "ring":
        draw.polygon(place(points * rng.uniform(0.42, 0.5)), fill=0)
    small = np.asarray(image, np.float64).reshape(CANVAS, scale, CANVAS, scale).mean((1, 3))
    return (np.round(small / 17) * 17).astype(np.uint8)  # 16 levels: compresses well


def photograph(path: Path) -> np.ndarray:
    """A photograph as a muted background: ``(128, 160, 3)`` uint8."""
    image = ImageOps.fit(Image.open(path).convert("RGB"), (160, 128), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.float64)
    grey = pixels.mean(-1, keepdims=True)
    muted = grey + 0.5 * (pixels - grey)
    return np.round(25 + muted * (150 / 255)).clip(0, 255).astype(np.uint8)


def build(file: Path = FILE, seed: int = 0) -> None:
    """Writes the asset file; needs scikit-image for the photographs."""
    require("skimage", extra="dev")
    import skimage

    rng = np.random.default_rng(seed)
    arrays = {}
    folder = Path(skimage.__file__).parent / "data"
    for split in ("train", "test"):
        arrays[f"photographs_{split}"] = np.stack([photograph(folder / name) for name in PHOTOGRAPHS[split]])
        arrays[f"glyphs_{split}"] = np.stack([[glyph(s, rng) for _ in range(GLYPHS[split])] for s in SHAPES])
    np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    build()
    print(f"{FILE.name}: {FILE.stat().st_size / 1e3:.0f} kB")
