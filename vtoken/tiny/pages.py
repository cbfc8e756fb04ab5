"""Pages of words and numbers in rows and columns, and questions about them: reading, where each patch counts.

A page is a function of ``(seed, split)`` alone, as a scene is (`vtoken.tiny.scenes`). The ``test`` split uses
font families, photographs and layouts (blocks and gaps) that ``train`` never shows.

A page has one to three blocks, each with a word and a number per row, which belong to each other. Letters are
11 to 13 px high; a patch of 16 px shows two of them, so a word takes two patches and a number one. Each half
of a word occurs in no other word. No word and no number is twice on a page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image

from .letters import FILE, LETTERS
from .scenes import Question, background, balanced, generator

SIDE = 256
CELL = 16  # px; a patch, shows two letters
_WORDS = (
    "tree fish bird lake moon rain snow wind gold salt milk bear leaf corn rice boat "
    "road wolf door drum ball tuna oven menu clay frog swan hawk desk crab tent nest"
)
WORDS = tuple(_WORDS.split())
FIGURES = tuple(a + b for a in "124679" for b in "124679")  # digits that are not alike
KINDS = ("number", "word", "exists")
FORMS = {  # the first form is the one that `questions` uses; a recipe may draw from all of them
    "number": ("which number belongs to {entry}?", "find the number of {entry}."),
    "word": ("which word belongs to {entry}?", "find the word of {entry}."),
    "exists": ("does the page show {entry}?", "is there {entry}?"),
}


@dataclass(frozen=True)
class Layout:
    """Blocks side by side, empty cells from a word to its number and between blocks, from row to row."""

    blocks: int
    gap: int
    apart: int = 0
    pitch: int = 1

    @property
    def width(self) -> int:
        """Cells from the first word to the last number."""
        return self.blocks * (3 + self.gap) + (self.blocks - 1) * self.apart


LAYOUTS = {
    "train": (
        Layout(1, 0),
        Layout(1, 2),
        Layout(2, 0, 2),
        Layout(2, 0, 3, 2),
        Layout(2, 2, 1),
        Layout(2, 2, 3),
        Layout(3, 0, 1),
        Layout(3, 0, 2),
        Layout(3, 0, 3, 2),
    ),
    "test": (Layout(2, 1, 1), Layout(2, 1, 2), Layout(2, 1, 3, 2), Layout(3, 1, 1), Layout(3, 1, 2, 2)),
}
ENTRIES = (20, 56)  # fewest and most entries of a page


@dataclass(frozen=True)
class Entry:
    """A word or a number, its box ``(left, top, right, bottom)`` in px and its place in the grid.

    ``partner`` is the number of a word or the word of a number. ``spans``: left and right end of each letter
    in px.
    """

    text: str
    box: tuple[int, int, int, int]
    row: int
    column: int
    partner: str
    spans: tuple[tuple[int, int], ...] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Page:
    """An RGB image of 256 x 256 px, its 20 to 56 entries, its layout and its origin."""

    image: Image.Image = field(repr=False, compare=False)
    entries: tuple[Entry, ...]
    layout: Layout
    seed: int
    split: str
    paper: str

    @property
    def media(self) -> Image.Image:
        """The image for a prompt."""
        return self.image


@lru_cache(maxsize=1)
def _faces() -> dict[str, np.ndarray]:
    with np.load(FILE) as stored:
        return dict(stored)


def make_page(seed: int, split: str = "train") -> Page:
    """Composes the page ``seed`` (an int >= 0) of a split (``train`` or ``test``).

    Raises:
        ValueError: unknown split or negative seed.
    """
    rng = generator(seed, split)
    layout = LAYOUTS[split][int(rng.integers(len(LAYOUTS[split])))]
    faces = rng.integers(len(_faces()[f"masks_{split}"]), size=2).tolist()  # of words and of numbers
    entries = _place(rng, layout, split, faces)
    pixels, paper = _paper(rng, split)
    ink = rng.integers(0, 70, size=3)
    for entry in entries:
        _print(pixels, entry, split, faces[entry.text in FIGURES], ink)
    image = Image.fromarray(pixels.astype(np.uint8))
    return Page(image, tuple(entries), layout, int(seed), split, paper)


def _place(rng: np.random.Generator, layout: Layout, split: str, faces: list[int]) -> list[Entry]:
    """The entries of a page in rows, at drawn places."""
    side, pairs = SIDE // CELL, 2 * layout.blocks
    fewest, most = -(-ENTRIES[0] // pairs), min((side - 1) // layout.pitch + 1, ENTRIES[1] // pairs)
    rows = int(rng.integers(min(fewest, most), most + 1))
    words = iter([WORDS[i] for i in rng.permutation(len(WORDS))])
    figures = iter([FIGURES[i] for i in rng.permutation(len(FIGURES))])
    left = int(rng.integers(side - layout.width + 1))
    top = int(rng.integers(side - layout.pitch * (rows - 1)))
    entries = []
    for row in range(rows):
        for block in range(layout.blocks):
            at = left + block * (3 + layout.gap + layout.apart)
            word, figure = next(words), next(figures)
            both = ((word, figure, at), (figure, word, at + 2 + layout.gap))
            for k, (text, partner, cell) in enumerate(both):
                spans, above, below = _set(rng, text, split, faces[k], cell, top + row * layout.pitch)
                box = (spans[0][0], above, spans[-1][1], below)
                entries.append(Entry(text, box, row, 2 * block + k, partner, spans))
    return entries


def _set(
    rng: np.random.Generator, text: str, split: str, face: int, column: int, row: int
) -> tuple[tuple[tuple[int, int], ...], int, int]:
    """Left and right end of each letter of a text, its top and bottom in px; up to 1 px off the middle."""
    stored = _faces()
    widths = [int(stored[f"widths_{split}"][face][LETTERS.index(letter)]) for letter in text.upper()]
    height = int(stored[f"heights_{split}"][face])
    right, down = int(rng.integers(2)), int(rng.integers(-1, 2))
    wide = CELL // 2
    starts = [column * CELL + i * wide + right + (wide - 1 - width) // 2 for i, width in enumerate(widths)]
    top = row * CELL + (CELL - height) // 2 + down
    return tuple((x, x + width) for x, width in zip(starts, widths)), top, top + height


def _paper(rng: np.random.Generator, split: str) -> tuple[np.ndarray, str]:
    """Light paper, plain or a pale photograph: ``(256, 256, 3)`` int32, and what it is."""
    light = rng.integers(205, 251, size=3).astype(np.int32)
    photograph, name = background(rng, split, SIDE, SIDE)
    if rng.integers(2):
        return np.broadcast_to(light, (SIDE, SIDE, 3)).copy(), "plain"
    return (light - 40 + photograph * 50 // 200).clip(0, 255), name


def _print(pixels: np.ndarray, entry: Entry, split: str, face: int, ink: np.ndarray) -> None:
    masks, top = _faces()[f"masks_{split}"][face], entry.box[1]
    for letter, (left, right) in zip(entry.text.upper(), entry.spans):
        window = pixels[top : entry.box[3], left:right]
        alpha = masks[LETTERS.index(letter), : entry.box[3] - top, : right - left, None].astype(np.int32)
        window[:] = (alpha * ink + (255 - alpha) * window + 127) // 255


def questions(page: Page, forms: np.random.Generator | None = None) -> list[Question]:
    """All questions about a page, each with exactly one right answer.

    With ``forms`` (a numpy generator) the wording is drawn from ``FORMS``; without it the first wording is
    used. As many ``exists`` questions are answered no as yes.
    """
    rng = generator(page.seed, page.split, 1)

    def ask(kind: str, entry: str, answer: str) -> Question:
        form = 0 if forms is None else int(forms.integers(len(FORMS[kind])))
        return Question(FORMS[kind][form].format(entry=entry), answer, kind)

    asked = [ask("number" if e.text in WORDS else "word", e.text, e.partner) for e in page.entries]
    shown = [e.text for e in page.entries if e.text in WORDS]
    missing = [word for word in WORDS if word not in shown]
    n = min(len(shown), len(missing))
    for texts, answer in ((shown, "yes"), (missing, "no")):
        asked += [ask("exists", texts[i], answer) for i in rng.permutation(len(texts))[:n]]
    return asked


def held_out(n: int, seed: int = 0) -> list[tuple[Page, Question]]:
    """``n`` questions about ``n`` different pages of the test split, balanced over ``KINDS``.

    ``seed`` picks a disjoint set of pages (a million apart). Within a kind the question is drawn evenly.
    """
    first = seed * 1_000_000
    return balanced(n, seed, (2,), KINDS, lambda i: make_page(first + i, "test"), questions)


def vocabulary() -> list[str]:
    """Every word and mark of the questions and answers, sorted."""
    text = " ".join(form for forms in FORMS.values() for form in forms).replace("?", " ").replace(".", " ")
    words = {word for word in text.split() if "{" not in word}
    return sorted(words | {"?", ".", "yes", "no"} | set(WORDS) | set(FIGURES))
