"""Pages of words and numbers in rows and columns, and questions about them: reading, where each patch counts.

A page is a function of ``(seed, split)`` alone, as a scene is (`vtoken.tiny.scenes`). The ``test`` split uses
font families, photographs and layouts (numbers of columns, gaps) that ``train`` never shows.

A page is a table (a column of words, one to four columns of numbers, a word above each of these) or a list
(one to three blocks of a word and a number per row). A number belongs to the word that its row begins with,
in a list to the one before it. Letters are 7 or 8 px high and lie in cells of 8 px. No word and no number is
twice on a page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image

from .letters import FILE, LETTERS
from .scenes import Question, background, balanced, generator

SIDE = 192
_WORDS = (
    "tree cat dog fish bird lake moon sun rain snow wind fire gold iron salt milk bear leaf pear corn rice "
    "tea boat ship car sand road wolf door lamp rose book pen coin bell drum hat shoe ball key"
)
WORDS = tuple(_WORDS.split())
FIGURES = tuple(str(n) for n in range(10, 100))
KINDS = ("number", "word", "right", "exists")
FORMS = {  # the first form is the one that `questions` uses; a recipe may draw from all of them
    "number": ("which number belongs to {entry}?", "find the number of {entry}."),
    "word": ("which word belongs to {entry}?", "find the word of {entry}."),
    "right": ("what is right of {entry}?", "what stands right of {entry}?"),
    "exists": ("is {entry} on the page?", "does the page show {entry}?"),
}
# columns of numbers of a table, blocks of a list; row height and gaps in cells of 8 px
LAYOUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "train": {"table": (1, 2, 4), "list": (1, 3), "pitch": (2, 3), "gap": (1, 3), "apart": (1, 2)},
    "test": {"table": (3,), "list": (2,), "pitch": (2,), "gap": (2,), "apart": (3,)},
}
CELL = 8  # px; every letter lies in a cell of its own
ENTRIES = (20, 60)  # fewest and most entries of a page
_FEWEST_ROWS = 4


@dataclass(frozen=True)
class Entry:
    """A word or a number, its box ``(left, top, right, bottom)`` in px and its place in the grid.

    ``word`` is the one that a number belongs to, ``head`` the word above its column, ``left`` the entry
    before it in its row of the table or block; empty if there is none. ``spans``: left and right end of each
    letter in px.
    """

    text: str
    box: tuple[int, int, int, int]
    row: int
    column: int
    word: str
    head: str
    left: str
    spans: tuple[tuple[int, int], ...] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Page:
    """An RGB image of 192 x 192 px, its 20 to 60 entries, its layout (``table 4``, ``list 2``) and origin."""

    image: Image.Image = field(repr=False, compare=False)
    entries: tuple[Entry, ...]
    layout: str
    pitch: int
    gap: int
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
    layouts = LAYOUTS[split]
    kind = ("table", "list")[int(rng.integers(2))]
    count = _pick(rng, layouts[kind])
    while True:
        pitch, gap = _pick(rng, layouts["pitch"]), _pick(rng, layouts["gap"])
        faces = rng.integers(len(_faces()[f"masks_{split}"]), size=3).tolist()  # of heads, words and numbers
        grid = _table(rng, count, pitch) if kind == "table" else _list(rng, count, pitch)
        entries = _place(rng, grid, split, faces, pitch, gap, _pick(rng, layouts["apart"]))
        if len(entries) >= ENTRIES[0]:
            break
    pixels, paper = _paper(rng, split)
    ink = rng.integers(0, 70, size=3)
    for entry, which in entries:
        _print(pixels, entry, split, faces[which], ink)
    image = Image.fromarray(pixels.astype(np.uint8))
    return Page(image, tuple(e for e, _ in entries), f"{kind} {count}", pitch, gap, int(seed), split, paper)


def _pick(rng: np.random.Generator, values: tuple[int, ...]) -> int:
    return values[int(rng.integers(len(values)))]


# of a grid: text, its word, head and left, face (0 heads, 1 words, 2 numbers), whether a block begins here
Cell = tuple[str, str, str, str, int, bool]


def _rows(rng: np.random.Generator, pitch: int, per_row: int, extra: int, most_words: int) -> int:
    """A number of rows that fits the page and leaves it with 20 to 60 entries."""
    fewest = max(_FEWEST_ROWS, -(-(ENTRIES[0] - extra) // per_row))
    fits = (SIDE // CELL - 1) // pitch + 1 - (extra > 0)
    most = min(fits, (ENTRIES[1] - extra) // per_row, most_words)
    return int(rng.integers(min(fewest, most), most + 1))


def _table(rng: np.random.Generator, count: int, pitch: int) -> list[list[Cell | None]]:
    rows = _rows(rng, pitch, count + 1, count, 30)
    words = [WORDS[i] for i in rng.permutation(len(WORDS))]
    figures = iter([FIGURES[i] for i in rng.permutation(len(FIGURES))])
    heads, owners = words[:count], words[count : count + rows]
    grid: list[list[Cell | None]] = [[None]]
    for i, head in enumerate(heads):
        grid[0].append((head, "", "", heads[i - 1] if i else "", 0, False))
    for owner in owners:
        row: list[Cell | None] = [(owner, "", "", "", 1, False)]
        for head in heads:
            figure, before = next(figures), row[-1]
            row.append((figure, owner, head, before[0] if before else "", 2, False))
        grid.append(row)
    return grid


def _list(rng: np.random.Generator, count: int, pitch: int) -> list[list[Cell | None]]:
    rows = _rows(rng, pitch, 2 * count, 0, 30 // count)
    words = iter([WORDS[i] for i in rng.permutation(len(WORDS))])
    figures = iter([FIGURES[i] for i in rng.permutation(len(FIGURES))])
    grid: list[list[Cell | None]] = []
    for _ in range(rows):
        row: list[Cell | None] = []
        for _ in range(count):
            word = next(words)
            row += [(word, "", "", "", 1, True), (next(figures), word, "", word, 2, False)]
        grid.append(row)
    return grid


def _place(
    rng: np.random.Generator,
    grid: list[list[Cell | None]],
    split: str,
    faces: list[int],
    pitch: int,
    gap: int,
    apart: int,
) -> list[tuple[Entry, int]]:
    """The entries of a grid at drawn places, with their faces; none if the grid is too wide for the page."""
    lefts, at = [], 0
    for k, cell in enumerate(grid[-1]):
        at += (apart if cell and cell[5] else gap) if k else 0
        lefts.append(at)
        at += max(len(entry[0]) for row in grid if (entry := row[k]))
    if at > SIDE // CELL:
        return []
    left = int(rng.integers(SIDE // CELL - at + 1))
    top = int(rng.integers(SIDE // CELL - pitch * (len(grid) - 1)))
    entries = []
    for i, row in enumerate(grid):
        for k, cell in enumerate(row):
            if cell is None:
                continue
            text, word, head, before, face, _ = cell
            ends, y, bottom = _set(rng, text, split, faces[face], left + lefts[k], top + i * pitch)
            box = (ends[0][0], y, ends[-1][1], bottom)
            entries.append((Entry(text, box, i, k, word, head, before, ends), face))
    return entries


def _set(
    rng: np.random.Generator, text: str, split: str, face: int, column: int, row: int
) -> tuple[tuple[tuple[int, int], ...], int, int]:
    """Left and right end of each letter of a text, its top and bottom in px; up to 1 px off the cells."""
    stored = _faces()
    widths = [int(stored[f"widths_{split}"][face][LETTERS.index(letter)]) for letter in text.upper()]
    height = int(stored[f"heights_{split}"][face])
    right, down = int(rng.integers(2)), int(rng.integers(CELL - height + 1))
    starts = [(column + i) * CELL + right + (CELL - 1 - width) // 2 for i, width in enumerate(widths)]
    top = row * CELL + down
    return tuple((x, x + width) for x, width in zip(starts, widths)), top, top + height


def _paper(rng: np.random.Generator, split: str) -> tuple[np.ndarray, str]:
    """Light paper, plain or a pale photograph: ``(192, 192, 3)`` int32, and what it is."""
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
    used. In a table with several columns of numbers, the number of a word is asked for "under" the word above
    the column. As many ``exists`` questions are answered no as yes, if there are words enough.
    """
    rng = generator(page.seed, page.split, 1)

    def ask(kind: str, entry: str, answer: str) -> Question:
        form = 0 if forms is None else int(forms.integers(len(FORMS[kind])))
        return Question(FORMS[kind][form].format(entry=entry), answer, kind)

    several = page.layout.startswith("table") and page.layout != "table 1"
    asked = []
    for entry in page.entries:
        if entry.word:
            under = f" under {entry.head}" if several else ""
            asked.append(ask("number", entry.word + under, entry.text))
            asked.append(ask("word", entry.text, entry.word))
        if entry.left:
            asked.append(ask("right", entry.left, entry.text))
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
    return sorted(words | {"?", ".", "under", "yes", "no"} | set(WORDS) | set(FIGURES))
