"""Which files an event of a page may name: those that its visitors uploaded.

gradio copies whatever an event names as a file, from this machine or from an address, wherever it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def names_other_files(body: bytes, uploads: Path | None) -> bool:
    """Whether an event names a file that is no upload, or is no JSON.

    Args:
        body: of the request.
        uploads: the folder that uploaded files lie in; None where there are none.
    """
    try:
        return not all(_is_upload(found, uploads) for found in _files(json.loads(body)))
    except (ValueError, RecursionError):
        return True


def _files(value: Any) -> Iterator[dict[str, Any]]:
    """The mappings in a JSON value that gradio takes for files."""
    if isinstance(value, dict):
        if {"path", "url"} & set(value):
            yield value
        value = [*value.values()]
    if isinstance(value, list):
        for each in value:
            yield from _files(each)


def _is_upload(found: dict[str, Any], uploads: Path | None) -> bool:
    """Whether a mapping's path is a regular file in the folder, and no link."""
    path = found.get("path")
    if (
        uploads is None
        or not isinstance(path, str)
        or not Path(path).is_absolute()
        or Path(path).is_symlink()
    ):
        return False
    real = Path(path).resolve()
    return uploads.resolve() in real.parents and real.is_file()
