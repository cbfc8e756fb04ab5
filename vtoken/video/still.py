"""Still pictures, read by the library's one picture loader for right colours and EXIF orientation."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..images import open_image
from ..limits import Limits
from .source import Source


def still_of(source: Source, container: Any, limits: Limits) -> np.ndarray | None:
    """(h, w, 3) uint8 RGB of the first picture of a file of still pictures.

    None for other sources, for a damaged file, and for a format that only libav reads.

    Args:
        container: of PyAV, opened on it.
    """
    if source.live or source.kind not in ("file", "object"):
        return None
    format = container.format.name
    if format != "image2" and not format.endswith("_pipe"):
        return None
    try:
        return np.array(_open(source.path or source.target, limits))
    except ValueError:
        return None


def _open(file: Any, limits: Limits) -> Any:
    if isinstance(file, str):
        return open_image(file, limits)
    place = file.tell()  # libav reads on from there
    try:
        file.seek(0)
        return open_image(file, limits)
    finally:
        file.seek(place)
