"""Scenes of a few coloured shapes on photographs, and questions about them: the data of the tiny models.

A scene is a function of ``(seed, split)`` alone: stored bytes, PCG64 and integer arithmetic, so it is the same on every
machine. The ``test`` split uses glyphs and photographs that the ``train`` split never shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image

from .assets import CANVAS, FILE, PHOTOGRAPHS, SHAPES

SIZE = 96
COLOURS = {
    "red": (220, 35, 35),
    "green": (40, 175, 55),
    "blue": (45, 75, 235),
    "yellow": (245, 225, 45),
    "purple": (185, 55, 215),
    "cyan": (50, 220, 230),
    "orange": (250, 140, 25),
}
KINDS = ("shape", "colour", "where", "count", "exists")
NUMBERS = ("zero", "one", "two", "three", "four")
SPLITS = ("train", "test")
FORMS = {  # the first form is the one that `questions` uses; a recipe may draw from all of them
    "shape": ("what shape is the {colour} one?", "which shape is {colour}?"),
    "colour": ("what colour is the {shape}?", "what color is the {shape}?"),
    "where": ("where is the {name}?", "find the {name}."),
    "count": ("how many objects are there?", "how many shapes are there?"),
    "exists": ("is there a {colour} {shape}?", "do you see a {colour} {shape}?"),
}
_EDGE, _MIDDLE, _APART = 11, 7, 23  # px: centre to border, to the image's middle lines, to another centre


@dataclass(frozen=True)
class SceneObject:
    """One object: its names, its bounding box ``(left, top, right, bottom)`` in px and its ``(24, 24)`` uint8 mask."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]
    mask: np.ndarray = field(repr=False, compare=False)
    origin: tuple[int, int] = field(repr=False, compare=False)  # left, top of the mask in the image

    @property
    def place(self) -> str:
        """The quadrant of the image that holds the object: ``top left``, ``bottom right``, ..."""
        x, y = (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2
        return f"{'top' if y < SIZE / 2 else 'bottom'} {'left' if x < SIZE / 2 else 'right'}"


@dataclass(frozen=True)
class Scene:
    """A 96 x 96 RGB image, its objects (2 to 4, no shape and no colour twice) and where it comes from."""

    image: Image.Image = field(repr=False, compare=False)
    objects: tuple[SceneObject, ...]
    seed: int
    split: str
    background: str

    @property
    def media(self) -> Image.Image:
        """What a prompt shows: the image."""
        return self.image

    def coverage(self, patch: int = 8) -> np.ndarray:
        """Share of each patch that each object covers: ``(objects, 96 // patch, 96 // patch)`` float32 in 0..1."""
        grid = SIZE // patch
        canvas = np.zeros((len(self.objects), SIZE, SIZE), np.float32)
        for layer, item in zip(canvas, self.objects):
            left, top = item.origin
            layer[top : top + CANVAS, left : left + CANVAS] = item.mask[: SIZE - top, : SIZE - left]
        return canvas.reshape(-1, grid, patch, grid, patch).mean((2, 4)) / 255


@dataclass(frozen=True)
class Question:
    """A question in lower case, its one- or two-word answer and its kind (one of ``KINDS``)."""

    text: str
    answer: str
    kind: str


@lru_cache(maxsize=1)
def _assets() -> dict[str, np.ndarray]:
    with np.load(FILE) as stored:
        return dict(stored)


def make_scene(seed: int, split: str = "train") -> Scene:
    """Composes the scene ``seed`` (an int >= 0) of a split (``train`` or ``test``).

    Raises:
        ValueError: unknown split or negative seed.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use {' or '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"the seed of a scene must be 0 or more, got {seed}")
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split)]))
    assets = _assets()
    photographs, glyphs = assets[f"photographs_{split}"], assets[f"glyphs_{split}"]
    which = int(rng.integers(len(photographs)))
    top = int(rng.integers(photographs.shape[1] - SIZE + 1))
    left = int(rng.integers(photographs.shape[2] - SIZE + 1))
    pixels = photographs[which, top : top + SIZE, left : left + SIZE].astype(np.int32)
    if rng.integers(2):
        pixels = pixels[:, ::-1]
    pixels = (pixels * int(rng.integers(180, 281)) // 256).clip(0, 200)

    count = int(rng.integers(2, 5))
    shapes = rng.permutation(len(SHAPES))[:count]
    names = tuple(COLOURS)
    colours = rng.permutation(len(names))[:count]
    objects = []
    for (x, y), shape, colour in zip(_centres(rng, count), shapes, colours):
        mask = glyphs[shape, int(rng.integers(glyphs.shape[1]))]
        left, top = x - CANVAS // 2, y - CANVAS // 2
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        inside = mask[max(0, -top) : SIZE - top, max(0, -left) : SIZE - left]
        mask, left, top = inside, max(0, left), max(0, top)
        window = pixels[top : top + mask.shape[0], left : left + mask.shape[1]]
        tint = np.array(COLOURS[names[colour]]) + rng.integers(-15, 16, size=3)
        alpha = mask[..., None].astype(np.int32)
        window[:] = (alpha * tint.clip(0, 255) + (255 - alpha) * window + 127) // 255
        box = (x - 12 + columns[0], y - 12 + rows[0], x - 11 + columns[-1], y - 11 + rows[-1])
        padded = np.zeros((CANVAS, CANVAS), np.uint8)
        padded[: mask.shape[0], : mask.shape[1]] = mask
        objects.append(SceneObject(SHAPES[shape], names[colour], tuple(int(v) for v in box), padded, (left, top)))
    image = Image.fromarray(pixels.astype(np.uint8))
    name = PHOTOGRAPHS[split][which].partition(".")[0]
    return Scene(image, tuple(objects), int(seed), split, name)


def _centres(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Centres away from the border, from the middle lines (so that `where` is plain) and from each other."""
    while True:
        chosen: list[tuple[int, int]] = []
        for x, y in rng.integers(_EDGE, SIZE - _EDGE + 1, size=(40, 2)).tolist():
            if min(abs(x - SIZE // 2), abs(y - SIZE // 2)) < _MIDDLE:
                continue
            if all(max(abs(x - a), abs(y - b)) >= _APART for a, b in chosen):
                chosen.append((x, y))
            if len(chosen) == count:
                return chosen


def questions(scene: Scene, forms: np.random.Generator | None = None) -> list[Question]:
    """All questions about a scene, each with exactly one right answer.

    With ``forms`` (a numpy generator) the wording is drawn from ``FORMS``; without it the first wording is used.
    As many ``exists`` questions are answered yes as no; a "no" pairs a colour and a shape that are not on one object.
    """
    rng = np.random.Generator(np.random.PCG64([scene.seed, SPLITS.index(scene.split), 1]))

    def ask(kind: str, answer: str, **words: str) -> Question:
        form = 0 if forms is None else int(forms.integers(len(FORMS[kind])))
        return Question(FORMS[kind][form].format(**words), answer, kind)

    pairs = {(item.colour, item.shape) for item in scene.objects}
    asked = [ask("count", NUMBERS[len(scene.objects)])]
    for item in scene.objects:
        colour, shape = item.colour, item.shape
        asked.append(ask("shape", shape, colour=colour))
        asked.append(ask("colour", colour, shape=shape))
        asked.append(ask("where", item.place, name=f"{colour} one"))
        asked.append(ask("where", item.place, name=shape))
        asked.append(ask("exists", "yes", colour=colour, shape=shape))
        while (colour, shape) in pairs:
            if rng.integers(2):
                colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
            else:
                shape = SHAPES[rng.integers(len(SHAPES))]
        asked.append(ask("exists", "no", colour=colour, shape=shape))
    return asked


def held_out(n: int, seed: int = 0) -> list[tuple[Scene, Question]]:
    """``n`` questions about ``n`` different scenes of the test split, balanced over ``KINDS``.

    ``seed`` picks a disjoint set of scenes (a million apart). Within a kind the question is drawn evenly.
    """
    if n < 0 or seed < 0:
        raise ValueError(f"held_out needs n >= 0 and seed >= 0, got n={n}, seed={seed}")
    rng = np.random.Generator(np.random.PCG64([seed, 2]))
    chosen = []
    for i in range(n):
        scene = make_scene(seed * 1_000_000 + i, "test")
        fitting = [q for q in questions(scene) if q.kind == KINDS[i % len(KINDS)]]
        chosen.append((scene, fitting[int(rng.integers(len(fitting)))]))
    return chosen


def vocabulary() -> list[str]:
    """Every word and mark that questions and answers are made of, sorted."""
    text = " ".join(form for forms in FORMS.values() for form in forms).replace("?", " ").replace(".", " ")
    words = {word for word in text.split() if "{" not in word}
    places = {"top", "bottom", "left", "right"}
    return sorted(words | {"?", ".", "one", "yes", "no"} | places | set(NUMBERS) | set(SHAPES) | set(COLOURS))
