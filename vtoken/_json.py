"""JSON: parsing of untrusted bytes into a value or a ValueError of one sentence; compact writing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

DEEPEST = 100  # levels of lists and objects
LARGEST = 64 * 2**20  # bytes of a file
DIGITS = 400  # of a number


def parse(text: str | bytes) -> Any:
    """Parse a JSON text in UTF-8.

    Raises:
        ValueError: for anything that RFC 8259 does not allow (NaN included), a key that appears twice in one
            object, a number too large for a float, or more than 100 levels; the reason, without a full stop.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    check_depth(value)
    return value


def read(path: Path, most: int = LARGEST) -> Any:
    """Parse a JSON file of at most `most` bytes.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger, a folder, or no JSON, with its name.
    """
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder, not a JSON file.")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{str(path)!r} has more than the {most} bytes that such a file can have.")
    try:
        return parse(data)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}.") from None


def value_of(text: str) -> Any:
    """A value on the command line, a number, a list or a word: as JSON, or as it stands."""
    try:
        return parse(text)
    except ValueError:
        return text


def compact(value: Any, deep: int = 2) -> str:
    """A short JSON text with one line per entry down to `deep` levels, so that two versions compare."""
    if not deep or not isinstance(value, dict | list) or not value:
        return json.dumps(value, separators=(",", ":"))
    if isinstance(value, dict):
        lines = [f"{json.dumps(k)}:{compact(v, deep - 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + "\n}"
    return "[\n" + ",\n".join(compact(v, deep - 1) for v in value) + "\n]"


def check_depth(value: Any) -> None:
    """Raise ValueError if lists and mappings are nested more than 100 levels deep."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list | tuple)
        ]
        if not inner:
            return
        level = [v for values in inner for v in values]
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number that JSON has")


def _float(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _int(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, which is too large")
    return int(digits)
