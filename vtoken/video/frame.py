"""`Frame`, one picture of a video, and `VideoReader`, the protocol of all readers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a video.

    Attributes:
        image: (height, width, 3) uint8, RGB, turned upright where the file carries a rotation.
        seconds: presentation time, 0 at the start of the source.
        index: place in presentation order, 0 first.
    """

    image: np.ndarray
    seconds: float
    index: int


@runtime_checkable
class VideoReader(Protocol):
    """Protocol of every back-end.

    `len(reader)` exists where frames can be counted; a stream raises TypeError.

    Attributes:
        fps: mean frame rate per second.
        duration: seconds, None where it is unknown.
        backend: "pyav", "decord", "torchcodec" or "synthetic".
        why: one sentence: why this back-end.
    """

    fps: float
    duration: float | None
    backend: str
    why: str

    def __iter__(self) -> Iterator[Frame]:
        """Frames in presentation order: `seconds` and `index` strictly increase."""

    def get_frames(
        self, indices: Sequence[int] | None = None, *, seconds: Sequence[float] | None = None
    ) -> list[Frame]:
        """The frames at `indices`, or those on screen at `seconds`, in the order asked for.

        Raises:
            VideoError: an index or time outside the video, a frame that cannot be decoded, a source without
                random access.
        """

    def close(self) -> None: ...

    def __enter__(self) -> VideoReader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
