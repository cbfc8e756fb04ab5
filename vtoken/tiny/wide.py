"""Wide and tall scenes for models that cut an image into crops: small objects on a large canvas.

A canvas is three crops of 64 px along its long side and two along the other, or 16 px less along that one (the
processor then pads it, and the model takes the padding's tokens out again). Objects are as large as in the plain scenes,
15 to 19 px, and lie within one crop each: none is cut. In the base image, 64 x 64 px of the whole, they are 5 to 6 px
along the long side.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from .assets import SHAPES
from .scenes import COLOURS, Question, Scene, background, generator, held_out, place_objects

TILE = 64
LAYOUTS = ((192, 128), (128, 192), (192, 112), (112, 192))  # width, height; that of scene i is i % 4
PINPOINTS = [[128, 192], [192, 128]]  # height, width
_EDGE, _MIDDLE, _APART = 11, 7, 23  # px: centre to a crop's border, to the canvas's middle lines, to another centre


def make_wide(seed: int, split: str = "train") -> Scene:
    """Composes the wide or tall scene ``seed`` (an int >= 0) of a split; its layout is ``LAYOUTS[seed % 4]``.

    Raises:
        ValueError: unknown split or negative seed.
    """
    rng = generator(seed, split, 3)
    width, height = LAYOUTS[seed % len(LAYOUTS)]
    pixels, name = background(rng, split, width, height)
    count = int(rng.integers(2, 5))
    shapes, colours = rng.permutation(len(SHAPES))[:count], rng.permutation(len(COLOURS))[:count]
    objects = place_objects(rng, pixels, split, shapes, colours, _centres(rng, count, width, height))
    return Scene(Image.fromarray(pixels.astype(np.uint8)), objects, int(seed), split, name)


def _allowed(length: int) -> np.ndarray:
    """Coordinates along a side of the canvas that a centre may have."""
    at = np.arange(length)
    within = (at + -length % TILE // 2) % TILE
    return at[
        (np.minimum(within, TILE - within) >= _EDGE) & (abs(at - length // 2) >= _MIDDLE) & _off_border(at, length)
    ]


def _off_border(at: np.ndarray, length: int) -> np.ndarray:
    return (at >= _EDGE) & (at <= length - _EDGE)


def _centres(rng: np.random.Generator, count: int, width: int, height: int) -> list[tuple[int, int]]:
    columns, rows = _allowed(width), _allowed(height)
    while True:
        chosen: list[tuple[int, int]] = []
        for _ in range(40):
            x, y = int(rng.choice(columns)), int(rng.choice(rows))
            if all(max(abs(x - a), abs(y - b)) >= _APART for a, b in chosen):
                chosen.append((x, y))
            if len(chosen) == count:
                return chosen


def cut(scene: Scene) -> np.ndarray:
    """The objects' masks as the model sees them: ``(1 + crops, objects, 64, 64)`` float32, the base image first.

    Crops go row by row, as those of the image processor.
    """
    masks = scene.masks()
    n, height, width = masks.shape
    base = [np.asarray(Image.fromarray(m).resize((TILE, TILE), Image.Resampling.BOX)) for m in masks]
    rows, columns = -(-height // TILE), -(-width // TILE)
    pad = (rows * TILE - height) // 2, (columns * TILE - width) // 2
    padded = np.pad(masks, ((0, 0), (pad[0], pad[0]), (pad[1], pad[1])))
    tiles = padded.reshape(n, rows, TILE, columns, TILE).transpose(1, 3, 0, 2, 4).reshape(-1, n, TILE, TILE)
    return np.concatenate([np.stack(base)[None], tiles])


def held_out_wide(n: int, seed: int = 0) -> list[tuple[Scene, Question]]:
    """``n`` questions about ``n`` wide or tall scenes of the test split, as `vtoken.tiny.scenes.held_out`."""
    return held_out(n, seed, make_wide)
