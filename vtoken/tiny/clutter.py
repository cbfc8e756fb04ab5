"""Cluttered scenes: 15 to 30 objects of three sizes on a photograph, and questions that name one of them.

A question names an object by its colour and shape, of which no pair occurs twice, and asks for its size or
its place, or whether it is there. A scene is 192 x 192 px, 576 visual tokens at a patch of 8 px. Objects
stand in rows whose number, width and offset differ between the splits (``LAYOUTS``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .assets import SHAPES
from .scenes import COLOURS, Question, Scene, SceneObject, background, balanced, generator, place_object

SIDE = 192
SIZES = {"small": 17, "middle": 24, "large": 33}  # side of the scaled mask in px; 24 is that of a plain scene
KINDS = ("size", "where", "exists")
FORMS = {
    "size": "what size is the {colour} {shape}?",
    "where": "where is the {colour} {shape}?",
    "exists": "is there a {colour} {shape}?",
}
_FEWEST, _MOST, _MIDDLE = 15, 30, 8  # objects; px from a centre to the middle lines for `where` to be plain


@dataclass(frozen=True)
class Layout:
    """Rows of equally wide cells, each with at most one object; every other row begins ``shift`` px later."""

    columns: int
    rows: int
    shift: int = 0

    def cells(self) -> list[tuple[int, int, int, int]]:
        """Left, top, right and bottom of the cells in px."""
        wide, tall = SIDE // self.columns, SIDE // self.rows
        starts = [row % 2 * self.shift for row in range(self.rows)]
        return [
            (left, row * tall, left + wide, row * tall + tall)
            for row, start in enumerate(starts)
            for left in range(start, SIDE - wide + 1, wide)
        ]


LAYOUTS = {
    "train": (Layout(6, 6), Layout(5, 6), Layout(6, 6, 24), Layout(5, 5)),
    "test": (Layout(6, 5), Layout(6, 6, 16), Layout(5, 6, 12)),
}


def make_clutter(seed: int, split: str = "train") -> Scene:
    """Composes the cluttered scene ``seed`` (an int >= 0) of a split.

    Raises:
        ValueError: unknown split or negative seed.
    """
    rng = generator(seed, split, 8)
    pixels, name = background(rng, split, SIDE, SIDE)
    cells = LAYOUTS[split][int(rng.integers(len(LAYOUTS[split])))].cells()
    count = min(int(rng.integers(_FEWEST, _MOST + 1)), len(cells))
    pairs = rng.permutation(len(SHAPES) * len(COLOURS))[:count]
    sizes = rng.integers(len(SIZES), size=count)
    objects = []
    for cell, pair, size in zip(rng.permutation(len(cells))[:count], pairs, sizes, strict=True):
        side = tuple(SIZES.values())[size]
        centre = _within(rng, cells[cell], side)
        objects.append(
            place_object(rng, pixels, split, pair // len(COLOURS), pair % len(COLOURS), centre, side)
        )
    return Scene(Image.fromarray(pixels.astype(np.uint8)), tuple(objects), int(seed), split, name)


def _within(rng: np.random.Generator, cell: tuple[int, int, int, int], side: int) -> tuple[int, int]:
    """A drawn centre for a glyph (about a sixth smaller than its mask) that keeps within a cell."""
    half = side * 5 // 12 + 1
    return tuple(
        int(rng.integers(low + half, high - half + 1)) if high - low > 2 * half else (low + high) // 2
        for low, high in ((cell[0], cell[2]), (cell[1], cell[3]))
    )


def size_of(item: SceneObject) -> str:
    """``small``, ``middle`` or ``large``."""
    return next(name for name, side in SIZES.items() if side == len(item.mask))


def questions(scene: Scene) -> list[tuple[Question, SceneObject | None]]:
    """All questions about a scene, each with exactly one right answer, and the object that it names.

    As many ``exists`` questions are answered yes as no.
    """
    rng = generator(scene.seed, scene.split, 9)
    pairs = {(o.colour, o.shape) for o in scene.objects}
    free = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in pairs]
    absent = [free[i] for i in rng.permutation(len(free))]
    asked: list[tuple[Question, SceneObject | None]] = []
    for i, item in enumerate(scene.objects):
        answers = {"size": size_of(item), "exists": "yes"}
        x, y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
        if min(abs(x - SIDE / 2), abs(y - SIDE / 2)) >= _MIDDLE:
            answers["where"] = item.place
        words = {"colour": item.colour, "shape": item.shape}
        asked += [(Question(FORMS[k].format(**words), a, k), item) for k, a in answers.items()]
        colour, shape = absent[i % len(absent)]
        asked.append((Question(FORMS["exists"].format(colour=colour, shape=shape), "no", "exists"), None))
    return asked


def held_out(n: int, seed: int = 0) -> list[tuple[Scene, Question]]:
    """``n`` questions about ``n`` different scenes of the test split, balanced over ``KINDS``.

    ``seed`` picks a disjoint set of scenes (a million apart). Within a kind the question is drawn evenly.
    """
    first = seed * 1_000_000

    def asked(scene: Scene) -> list[Question]:
        return [question for question, _ in questions(scene)]

    return balanced(n, seed, (1, 10), KINDS, lambda i: make_clutter(first + i, "test"), asked)


def vocabulary() -> list[str]:
    """Words of the questions and answers that the plain scenes do not have, sorted."""
    return sorted({"size", *SIZES})
