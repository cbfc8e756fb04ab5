"""Paths in a text that lead out of the folder of work, and so tell about the machine of whoever wrote it."""

from __future__ import annotations

import re
from collections.abc import Sequence

ADDRESS = re.compile(r"(?!file:)[A-Za-z][\w+.-]+://[^/\\\s,;][^\s,;]*")  # of another machine
BEGINS = re.compile(r"[/\\]+[^/\\\s]|~[^/\\]*[/\\]|[A-Za-z]:[/\\]")  # as paths of Linux and Windows do
BETWEEN = (re.compile(r"([,;=]\s*)"), re.compile(r"(:)"), re.compile(r"(\s+)"))
SLASHES = re.compile(r"[/\\]+")


def without_outside(text: str, between: Sequence[re.Pattern[str]] = BETWEEN) -> str:
    """The text with nothing but the last part of each path that is absolute, of a home folder, or has "..".

    Args:
        text: one path, or several words and paths.
        between: what may stand between these; a path with spaces in it is taken as one where a comma,
            semicolon, "=" or ":" stands on each side.
    """
    if ADDRESS.fullmatch(text):
        return text
    if not BETWEEN[0].search(text) and (BEGINS.match(text) or _goes_up(text)):
        return SLASHES.split(text.rstrip("/\\"))[-1]
    if not between:
        return text
    parts = between[0].split(text)  # the odd ones stood between
    return "".join(part if i % 2 else without_outside(part, between[1:]) for i, part in enumerate(parts))


def _goes_up(text: str) -> bool:
    return " " not in text and ".." in SLASHES.split(text)
