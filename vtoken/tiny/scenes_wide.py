"""Wide and tall scenes for models that cut an image into crops (any resolution: "anyres").

A layout is the size of a crop and of some canvases: whole crops along both sides, or 16 px less along one
(the processor then pads the image, and the model takes the padding's tokens out again). Objects are as large
as in the plain scenes, 15 to 19 px, and lie within one crop each: none is cut. With ``SMALL``, three crops by
two of 64 px, they are 5 to 6 px along the long side of the base image (64 x 64 px of the whole).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from .assets import SHAPES
from .scenes import COLOURS, Question, Scene, background, generator, held_out, place_objects


@dataclass(frozen=True)
class Layout:
    """Crop side in px, canvases (width, height), and the sizes (height, width) that whole crops make up.

    Scene ``i`` has the canvas ``i % len(canvases)``.
    """

    tile: int
    canvases: tuple[tuple[int, int], ...]
    pinpoints: tuple[tuple[int, int], ...]


SMALL = Layout(64, ((192, 128), (128, 192), (192, 112), (112, 192)), ((128, 192), (192, 128)))
LARGE = Layout(96, ((192, 96), (96, 192), (192, 80), (96, 96)), ((96, 96), (96, 192), (192, 96)))
# px: centre to a crop's border, to the canvas's middle lines, to another centre
_EDGE, _MIDDLE, _APART = 12, 7, 23


def make_wide(seed: int, split: str = "train", layout: Layout = SMALL) -> Scene:
    """Composes the wide or tall scene ``seed`` (an int >= 0) of a split.

    Raises:
        ValueError: unknown split or negative seed.
    """
    rng = generator(seed, split, 3)
    width, height = layout.canvases[seed % len(layout.canvases)]
    pixels, name = background(rng, split, width, height)
    count = int(rng.integers(2, 5))
    shapes, colours = rng.permutation(len(SHAPES))[:count], rng.permutation(len(COLOURS))[:count]
    objects = place_objects(
        rng, pixels, split, shapes, colours, _centres(rng, count, width, height, layout.tile)
    )
    return Scene(Image.fromarray(pixels.astype(np.uint8)), objects, int(seed), split, name)


def _allowed(length: int, tile: int) -> np.ndarray:
    """Allowed coordinates of a centre along a side of the canvas."""
    at = np.arange(length)
    within = (at + (-length % tile) // 2) % tile
    inside = np.minimum(at, length - at) >= _EDGE
    return at[inside & (np.minimum(within, tile - within) >= _EDGE) & (abs(at - length // 2) >= _MIDDLE)]


def _centres(
    rng: np.random.Generator, count: int, width: int, height: int, tile: int
) -> list[tuple[int, int]]:
    columns, rows = _allowed(width, tile), _allowed(height, tile)
    while True:
        chosen: list[tuple[int, int]] = []
        for _ in range(40):
            x, y = int(rng.choice(columns)), int(rng.choice(rows))
            if all(max(abs(x - a), abs(y - b)) >= _APART for a, b in chosen):
                chosen.append((x, y))
            if len(chosen) == count:
                return chosen


def cut(scene: Scene, tile: int = SMALL.tile) -> np.ndarray:
    """The objects' masks as the model sees them: ``(1 + crops, objects, tile, tile)`` float32, base first.

    Crops go row by row, as those of the image processor.
    """
    masks = scene.masks()
    n, height, width = masks.shape
    base = [np.asarray(Image.fromarray(m).resize((tile, tile), Image.Resampling.BOX)) for m in masks]
    rows, columns = -(-height // tile), -(-width // tile)
    pad = (rows * tile - height) // 2, (columns * tile - width) // 2
    padded = np.pad(masks, ((0, 0), (pad[0], pad[0]), (pad[1], pad[1])))
    tiles = padded.reshape(n, rows, tile, columns, tile).transpose(1, 3, 0, 2, 4).reshape(-1, n, tile, tile)
    return np.concatenate([np.stack(base)[None], tiles])


def held_out_wide(n: int, seed: int = 0, layout: Layout = SMALL) -> list[tuple[Scene, Question]]:
    """``n`` questions about ``n`` wide or tall scenes of the test split, as `vtoken.tiny.scenes.held_out`."""
    return held_out(n, seed, partial(make_wide, layout=layout))
