"""Random access by packages other than PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .errors import VideoError

if TYPE_CHECKING:
    from .pyav import PyAVReader


class Picker(Protocol):
    """Random access by another package, for files whose frames it numbers as the table does."""

    name: str

    def images(self, ordinals: Sequence[int]) -> list[np.ndarray]:
        """(h, w, 3) uint8 RGB of frames in ascending order; VideoError where one is damaged."""

    def close(self) -> None: ...


def check_count(name: str, count: int, reader: PyAVReader) -> None:
    """Raise VideoError if another package counts other frames than PyAV, so that its numbers differ."""
    if count != len(reader.table):
        raise VideoError(
            f"{name} counts {count} frames in {reader.source.name!r} and PyAV {len(reader.table)}"
        )
