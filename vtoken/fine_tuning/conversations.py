"""Conversations about images and videos, from a folder in LLaVA's format."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from .._json import parse

FILES = ("data.json", "data.jsonl")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
MARKS = re.compile(r"\s*<(image|video)>\s*")


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about the pictures of one prompt.

    Attributes:
        images: their files. videos: their files.
        turns: (role, text) pairs, "user" and "assistant" in turn; the pictures stand before the first text.
    """

    images: tuple[Path, ...]
    videos: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it."""
        shown = [{"type": "image"}] * len(self.images) + [{"type": "video"}] * len(self.videos)
        out: list[dict[str, Any]] = []
        for role, text in self.turns:
            content = (
                [*shown, {"type": "text", "text": text}] if not out else [{"type": "text", "text": text}]
            )
            out.append({"role": role, "content": content})
        return out


class Conversations(Dataset[Conversation]):
    """The conversations of a folder: `data.json` (a list) or `data.jsonl` (one object per line).

    An object has `image` and `video`, a file name inside the folder or a list of them, and `conversations`, a
    list of `{"from": "human" | "gpt", "value": text}`; or, shorter, `question` and `answer`.

    Args:
        folder: the folder.

    Raises:
        ValueError: in one sentence, for what cannot be read: the file, the number of the object, and what is
            wrong.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        path = next((self.folder / name for name in FILES if (self.folder / name).is_file()), None)
        if path is None:
            raise ValueError(f"{str(folder)!r} has no {' and no '.join(FILES)}: it needs one of them.")
        self.all: list[Conversation] = []
        for number, entry in _entries(path):
            try:
                self.all.append(self._read(entry))
            except ValueError as error:
                raise ValueError(f"Entry {number} of {str(path)!r}: {error}") from None
        if not self.all:
            raise ValueError(f"{str(path)!r} has no conversations.")

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> Conversation:
        return self.all[index]

    def _read(self, entry: Any) -> Conversation:
        if not isinstance(entry, dict):
            raise ValueError(f"an entry is an object, found {type(entry).__name__}.")
        if "conversations" in entry:
            said = entry["conversations"]
            if not isinstance(said, list):
                raise ValueError(f"conversations is a list of turns, found {type(said).__name__}.")
            turns = [_turn(each) for each in said]
        elif {"question", "answer"} <= entry.keys():
            turns = [_turn({"from": "human", "value": entry["question"]})]
            turns.append(_turn({"from": "gpt", "value": entry["answer"]}))
        else:
            raise ValueError(f"it needs conversations, or question and answer, found {', '.join(entry)}.")
        roles = [role for role, _ in turns]
        if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
            raise ValueError("user and assistant take turns, the user first and the assistant last.")
        images, videos = (self._files(entry.get(kind)) for kind in ("image", "video"))
        if not images and not videos:
            raise ValueError("it has neither an image nor a video.")
        return Conversation(images, videos, tuple(turns))

    def _files(self, named: Any) -> tuple[Path, ...]:
        names = [] if named is None else named if isinstance(named, list) else [named]
        out = []
        for name in names:
            path = (self.folder / _text(name)).resolve()
            if not path.is_relative_to(self.folder):
                raise ValueError(f"the file {name!r} lies outside of the folder.")
            if not path.is_file():
                raise ValueError(f"there is no file {name!r} in the folder.")
            out.append(path)
        return tuple(out)


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """The objects of a file, counted from 1."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            lines = [line for line in text.split("\n") if line.strip()]  # U+2028 ends no line here
            yield from enumerate(map(parse, lines), 1)
            return
        entries = parse(text)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}.") from None
    if not isinstance(entries, list):
        raise ValueError(f"{str(path)!r} holds a list of objects, found {type(entries).__name__}.")
    yield from enumerate(entries, 1)


def _turn(turn: Any) -> tuple[str, str]:
    role = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"a turn is from human or gpt, found {str(role)[:40]!r}.")
    return ROLES[role], MARKS.sub(_gap, _text(turn.get("value")))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a text or a file name is a string, found {type(value).__name__}.")
    return value


def _gap(mark: re.Match[str]) -> str:
    """The space between the words around a picture's mark; none at the ends of a text."""
    inside = mark.start() > 0 and mark.end() < len(mark.string)
    return ("\n" if "\n" in mark.group() else " ") if inside else ""
