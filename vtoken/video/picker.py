"""Random access by packages other than PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .errors import VideoError


class Picker(Protocol):
    """Random access by another package, for files whose frames it numbers as the table does."""

    name: str

    def images(self, ordinals: Sequence[int]) -> list[np.ndarray]:
        """(h, w, 3) uint8 RGB of frames in ascending order; VideoError where one is damaged."""

    def close(self) -> None: ...


def check_count(name: str, count: int, total: int, source: str) -> None:
    """Raise VideoError if another package does not count the `total` of PyAV: its numbers differ then."""
    if count != total:
        raise VideoError(f"{name} counts {count} frames in {source!r} and PyAV {total}")
