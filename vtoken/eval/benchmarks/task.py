"""The interface of a benchmark: `Task`, its items, prompts and scores, and the error for unreadable media."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ...images import rgb


class Unreadable(ValueError):
    """An image, video or subtitle file of one item that cannot be decoded; the sentence names it."""


@dataclass(frozen=True)
class Clip:
    """Sampled frames of a video.

    Attributes:
        frames: RGB images, in the order of `indices`.
        indices: which frames of the file these are, ascending; repeated where a clip has fewer frames than
            were wanted.
        fps: frames per second of the file.
        total: frames of the file.
    """

    frames: list[Image.Image] = field(repr=False)
    indices: list[int]
    fps: float
    total: int


@dataclass(frozen=True)
class Prompt:
    """One question as a model reads it: an image or a clip, then the text."""

    text: str
    image: Image.Image | None = None
    clip: Clip | None = None


@dataclass(frozen=True)
class Item:
    """One question of a data set.

    Attributes:
        name: unique; used in records and errors.
        question, answer: as in the data set, the answer normalised ("yes", "no" or a capital letter).
        group: the category or task type that it is counted under.
        media: information with which the task opens the image or video.
        options: the choices of a multiple-choice question, as the data set words them.
        about: further columns that a score is broken down by.
    """

    name: str
    question: str
    answer: str
    group: str
    media: Any = field(repr=False, compare=False)
    options: tuple[str, ...] = ()
    about: dict[str, str] = field(default_factory=dict, hash=False)


class Task(ABC):
    """Interface of a benchmark to the runner."""

    title: str
    items: Sequence[Item]
    max_new_tokens: int

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Settings on which answers depend; a run continues only under the same ones."""

    @abstractmethod
    def prompt(self, item: Item, frames: int | None = None) -> Prompt:
        """Open the media of an item. Raises Unreadable."""

    @abstractmethod
    def read(self, item: Item, text: str) -> str:
        """The answer in a model's text, in the words of `Item.answer`; "" if the protocol finds none."""

    @abstractmethod
    def breakdown(self, right: dict[str, bool]) -> Breakdown:
        """Scores of all items by name."""


@dataclass(frozen=True)
class Breakdown:
    """The scores of one run.

    Attributes:
        columns: headline figures for the table of runs, as they are printed.
        rows: a table of details, the first row being its head.
        scores: everything as numbers, for JSON.
    """

    columns: dict[str, str]
    rows: list[list[str]]
    scores: dict[str, Any]


def checked(items: Sequence[Item]) -> Sequence[Item]:
    """The items, with names checked to be unique.

    Raises:
        ValueError: for an empty data set or a name that occurs twice.
    """
    if not items:
        raise ValueError("The data set has no questions.")
    seen: set[str] = set()
    for item in items:
        if item.name in seen:
            raise ValueError(f"The data set asks {item.name!r} twice: every question has to be there once.")
        seen.add(item.name)
    return items


def fingerprint(items: Sequence[Item]) -> str:
    """The first digits of a SHA-256 over names, questions, options and answers."""
    digest = hashlib.sha256()
    for item in items:
        digest.update("\0".join((item.name, item.question, item.answer, *item.options, "")).encode())
    return digest.hexdigest()[:12]


def decoded(name: str, open_it: Callable[[], Image.Image]) -> Image.Image:
    """An RGB image, from a function that opens it.

    Raises:
        Unreadable: with the item's name if Pillow cannot decode it; decoders fail in many ways, none of which
            may end a run.
    """
    try:
        return rgb(open_it())
    except Exception as error:
        raise Unreadable(f"The image of {name} cannot be decoded: {one_line(error)}") from None


def one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
