"""Scenes of a few coloured shapes on photographs, and questions about them: the data of the tiny models.

A scene is a function of ``(seed, split)`` alone: stored bytes, PCG64 and integer arithmetic, so it is the
same on every machine. The ``test`` split uses glyphs and photographs that the ``train`` split never shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import numpy as np
from PIL import Image

from .assets import CANVAS, FILE, PHOTOGRAPHS, SHAPES

E = TypeVar("E")  # an example: a scene, a page, a clip
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
    """One object: names, bounding box ``(left, top, right, bottom)`` in px, square uint8 mask."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]
    mask: np.ndarray = field(repr=False, compare=False)
    origin: tuple[int, int] = field(repr=False, compare=False)  # left, top of the mask in the image
    # width, height of the image
    canvas: tuple[int, int] = field(default=(SIZE, SIZE), repr=False, compare=False)

    @property
    def place(self) -> str:
        """The quadrant of the image that holds the object: ``top left``, ``bottom right``, ..."""
        x, y = (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2
        return (
            f"{'top' if y < self.canvas[1] / 2 else 'bottom'} {'left' if x < self.canvas[0] / 2 else 'right'}"
        )


@dataclass(frozen=True)
class Scene:
    """An RGB image (96 x 96 px if plain), its 2 to 4 objects (no shape, no colour twice) and its origin."""

    image: Image.Image = field(repr=False, compare=False)
    objects: tuple[SceneObject, ...]
    seed: int
    split: str
    background: str

    @property
    def media(self) -> Image.Image:
        """The image for a prompt."""
        return self.image

    def masks(self) -> np.ndarray:
        """Pixels covered by each object: ``(objects, height, width)`` float32 in 0..1."""
        width, height = self.image.size
        canvas = np.zeros((len(self.objects), height, width), np.float32)
        for layer, item in zip(canvas, self.objects):
            left, top = item.origin
            mask = item.mask[: height - top, : width - left]
            layer[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        return canvas / 255


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


def generator(seed: int, split: str, *more: int) -> np.random.Generator:
    """The random generator of the scene ``seed`` (an int >= 0) of a split (``train`` or ``test``).

    Raises:
        ValueError: unknown split or negative seed.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use {' or '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"the seed of a scene must be 0 or more, got {seed}")
    return np.random.Generator(np.random.PCG64([seed, SPLITS.index(split), *more]))


def make_scene(seed: int, split: str = "train") -> Scene:
    """Composes the scene ``seed`` (an int >= 0) of a split (``train`` or ``test``).

    Raises:
        ValueError: unknown split or negative seed.
    """
    rng = generator(seed, split)
    pixels, name = background(rng, split, SIZE, SIZE)
    count = int(rng.integers(2, 5))
    shapes, colours = rng.permutation(len(SHAPES))[:count], rng.permutation(len(COLOURS))[:count]
    objects = place_objects(rng, pixels, split, shapes, colours, _centres(rng, count))
    return Scene(Image.fromarray(pixels.astype(np.uint8)), objects, int(seed), split, name)


def background(rng: np.random.Generator, split: str, width: int, height: int) -> tuple[np.ndarray, str]:
    """A drawn crop of a photograph, ``(height, width, 3)`` int32 in 0..200, and its name.

    Beyond its 160 x 128 px a photograph goes on as its mirror image.
    """
    photographs = _assets()[f"photographs_{split}"]
    which = int(rng.integers(len(photographs)))
    photograph = photographs[which]
    more = max(0, height - photograph.shape[0]), max(0, width - photograph.shape[1])
    if any(more):
        photograph = np.pad(photograph, ((0, more[0]), (0, more[1]), (0, 0)), mode="symmetric")
    top = int(rng.integers(photograph.shape[0] - height + 1))
    left = int(rng.integers(photograph.shape[1] - width + 1))
    pixels = photograph[top : top + height, left : left + width].astype(np.int32)
    if rng.integers(2):
        pixels = pixels[:, ::-1]
    return (pixels * int(rng.integers(180, 281)) // 256).clip(0, 200), PHOTOGRAPHS[split][which].partition(
        "."
    )[0]


def place_objects(
    rng: np.random.Generator,
    pixels: np.ndarray,
    split: str,
    shapes: Sequence[int],
    colours: Sequence[int],
    centres: Sequence[tuple[int, int]],
) -> tuple[SceneObject, ...]:
    """Paints a glyph of each shape in its colour around its centre ``(x, y)``, into ``pixels``."""
    each = zip(shapes, colours, centres)
    return tuple(place_object(rng, pixels, split, shape, colour, at) for shape, colour, at in each)


def place_object(
    rng: np.random.Generator,
    pixels: np.ndarray,
    split: str,
    shape: int,
    colour: int,
    centre: tuple[int, int],
    side: int = CANVAS,
) -> SceneObject:
    """Paints one glyph into ``pixels``; its mask is scaled to ``side`` px."""
    glyphs, name = _assets()[f"glyphs_{split}"], tuple(COLOURS)[colour]
    height, width = pixels.shape[:2]
    mask = glyphs[shape, int(rng.integers(glyphs.shape[1]))]
    if side != CANVAS:
        mask = np.asarray(Image.fromarray(mask).resize((side, side), Image.Resampling.BILINEAR))
    left, top = (at - side // 2 for at in centre)
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    inside = mask[max(0, -top) : height - top, max(0, -left) : width - left]
    left, top = max(0, left), max(0, top)
    window = pixels[top : top + inside.shape[0], left : left + inside.shape[1]]
    tint = np.array(COLOURS[name]) + rng.integers(-15, 16, size=3)
    alpha = inside[..., None].astype(np.int32)
    window[:] = (alpha * tint.clip(0, 255) + (255 - alpha) * window + 127) // 255
    padded = np.zeros((side, side), np.uint8)
    padded[: inside.shape[0], : inside.shape[1]] = inside
    corners = tuple(int(v) for v in box)
    return SceneObject(SHAPES[shape], name, corners, padded, (left, top), (width, height))


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

    With ``forms`` (a numpy generator) the wording is drawn from ``FORMS``; without it the first wording is
    used. As many ``exists`` questions are answered yes as no; a "no" pairs a colour and a shape that are not
    on one object.
    """
    rng = generator(scene.seed, scene.split, 1)

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


def held_out(
    n: int, seed: int = 0, make: Callable[[int, str], Scene] = make_scene
) -> list[tuple[Scene, Question]]:
    """``n`` questions about ``n`` different scenes of the test split, balanced over ``KINDS``.

    ``seed`` picks a disjoint set of scenes (a million apart), ``make`` composes them. Within a kind the
    question is drawn evenly.
    """
    first = seed * 1_000_000
    return balanced(n, seed, (2,), KINDS, lambda i: make(first + i, "test"), questions)


def balanced(
    n: int,
    seed: int,
    stream: tuple[int, ...],
    kinds: Sequence[str],
    example: Callable[[int], E],
    asked: Callable[[E], Sequence[Question]],
) -> list[tuple[E, Question]]:
    """One question about each of ``n`` examples, of each kind in turn, drawn evenly within a kind.

    Args:
        n, seed: 0 or more.
        stream: numbers that keep the draws of one kind of data apart from those of another.
        kinds: of the questions.
        example: makes the example with a number from 0 to ``n - 1``.
        asked: its questions.

    Raises:
        ValueError: negative ``n`` or ``seed``.
    """
    if n < 0 or seed < 0:
        raise ValueError(f"held_out needs n >= 0 and seed >= 0, got n={n}, seed={seed}")
    rng = np.random.Generator(np.random.PCG64([seed, *stream]))
    chosen = []
    for i in range(n):
        made = example(i)
        fitting = [q for q in asked(made) if q.kind == kinds[i % len(kinds)]]
        chosen.append((made, fitting[int(rng.integers(len(fitting)))]))
    return chosen


def vocabulary() -> list[str]:
    """Every word and mark of the questions and answers, sorted."""
    text = " ".join(form for forms in FORMS.values() for form in forms).replace("?", " ").replace(".", " ")
    words = {word for word in text.split() if "{" not in word}
    places = {"top", "bottom", "left", "right"}
    return sorted(words | {"?", ".", "one", "yes", "no"} | places | set(NUMBERS) | set(SHAPES) | set(COLOURS))
