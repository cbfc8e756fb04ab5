"""Contents of the clips: a slowly moving photograph, and moments with a digit, a coloured shape or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from .assets import CANVAS, FILE, PHOTOGRAPHS, SHAPES
from .digits import DIGITS
from .digits import FILE as DIGITS_FILE
from .scenes import COLOURS, SIZE, SceneObject

WHITE = "white"  # the colour of digits; no question asks for it


@dataclass(frozen=True)
class Moment:
    """The objects on screen from frame ``start`` up to, not including, frame ``stop``."""

    start: int
    stop: int
    digit: str | None
    shape: str | None
    colour: str | None  # of the shape
    objects: tuple[SceneObject, ...] = field(repr=False, compare=False)


@lru_cache(maxsize=1)
def _assets() -> dict[str, np.ndarray]:
    with np.load(FILE) as stored, np.load(DIGITS_FILE) as digits:
        return {**stored, **digits}


class Camera:
    """A photograph seen through a window that stands still or drifts by up to a pixel per frame and axis."""

    def __init__(self, rng: np.random.Generator, split: str) -> None:
        photographs = _assets()[f"photographs_{split}"]
        which = int(rng.integers(len(photographs)))
        self.name = PHOTOGRAPHS[split][which].partition(".")[0]
        pixels = photographs[which][:, :: -1 if rng.integers(2) else 1].astype(np.int32)
        self.pixels = (pixels * int(rng.integers(150, 231)) // 256).clip(0, 200)
        self.slack = [side - SIZE for side in pixels.shape[:2]]
        self.start = [int(rng.integers(slack)) for slack in self.slack]
        moving = int(rng.integers(2))
        self.speed = [moving * int(rng.integers(-1, 2)) for _ in self.slack]
        self.noise = int(rng.integers(1 << 62))

    def frame(self, index: int, objects: Sequence[SceneObject]) -> Image.Image:
        """Frame ``index`` with objects painted over the photograph."""
        top, left = (
            slack - abs((start + speed * index) % (2 * slack) - slack)
            for start, speed, slack in zip(self.start, self.speed, self.slack)
        )
        rng = np.random.Generator(np.random.PCG64([self.noise, index]))
        pixels = self.pixels[top : top + SIZE, left : left + SIZE].copy()
        for item in objects:
            x, y = item.origin
            window = pixels[y : y + CANVAS, x : x + CANVAS]
            alpha = item.mask[..., None].astype(np.int32)
            tint = np.array(COLOURS.get(item.colour, (250, 250, 250)))
            window[:] = (alpha * tint + (255 - alpha) * window + 127) // 255
        pixels += rng.integers(-2, 3, size=pixels.shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def bend(mask: np.ndarray, rng: np.random.Generator, most: float = 2.0) -> np.ndarray:
    """A mask ``(24, 24)`` uint8 deformed by a 3 x 3 mesh of points, each moved by up to ``most`` px.

    Strokes become thinner or thicker.
    """
    grid = np.linspace(0, CANVAS, 4).round().astype(int)
    moved = np.stack(np.meshgrid(grid, grid), -1) + rng.uniform(-most, most, (4, 4, 2))
    mesh = [
        (
            (int(grid[x]), int(grid[y]), int(grid[x + 1]), int(grid[y + 1])),
            tuple(moved[[y, y + 1, y + 1, y], [x, x, x + 1, x + 1]].flatten()),
        )
        for y in range(3)
        for x in range(3)
    ]
    bent = Image.fromarray(mask).transform(mask.shape, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)
    soft = np.asarray(bent.filter(ImageFilter.GaussianBlur(0.5)), np.float64)
    out = ((soft - 128) * 1.8 + 128 + rng.uniform(-70, 90)).clip(0, 255).astype(np.uint8)
    return out if (out > 127).sum() > 20 else mask


def draw_object(
    rng: np.random.Generator, split: str, name: str, colour: str, quadrant: int, bent: bool = False
) -> SceneObject:
    """A digit or shape from the masks of a split, placed in a quadrant 3 px or more from its borders.

    ``bent`` also deforms the mask: a tower that sees no two alike reads the test split's fonts better.
    """
    kind, number = ("digits", DIGITS.index(name)) if name in DIGITS else ("glyphs", SHAPES.index(name))
    masks = _assets()[f"{kind}_{split}"][number]
    mask = masks[int(rng.integers(len(masks)))]
    if bent:
        mask = bend(mask, rng)
    left, top = (quadrant % 2 * 48 + int(rng.integers(3, 22)), quadrant // 2 * 48 + int(rng.integers(3, 22)))
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    return SceneObject(name, colour, tuple(int(v) for v in box), mask, (left, top))


def draw_moment(
    rng: np.random.Generator,
    split: str,
    start: int,
    stop: int,
    digit: str | None,
    shape: str | None,
    colour: str,
) -> Moment:
    first, second = (int(q) for q in rng.permutation(4)[:2])
    objects = [] if digit is None else [draw_object(rng, split, digit, WHITE, first)]
    if shape is not None:
        objects.append(draw_object(rng, split, shape, colour, second))
    return Moment(start, stop, digit, shape, colour if shape else None, tuple(objects))
