"""Frame sampling: evenly over a video, by time, or by rate from a stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..limits import STANDARD
from .errors import VideoError, checked
from .frame import Frame, VideoReader


@checked
def uniform_indices(total: int, n: int, placement: str = "ends") -> list[int]:
    """Indices of min(n, total) distinct frames spread evenly over `total`.

    Args:
        placement: "ends" for first, last and equal steps between, rounded down, as `numpy.linspace(0, total -
            1, n)` does in the evaluation of LLaVA-style models; "middle" for the middle of each of n equal
            parts.

    Raises:
        VideoError: n or total below 1, or an unknown placement.
    """
    if n < 1 or total < 1:
        raise VideoError(f"cannot take {n} of {total} frames; both must be at least 1")
    if placement not in ("ends", "middle"):
        raise VideoError(f"placement is 'ends' or 'middle', got {placement!r}")
    if n >= total:
        return list(range(total))
    if placement == "middle":
        return [(2 * i + 1) * total // (2 * n) for i in range(n)]
    return [i * (total - 1) // max(n - 1, 1) for i in range(n)]


@checked
def sample_uniform(reader: VideoReader, n: int, placement: str = "ends") -> list[Frame]:
    """Evenly spread frames of a video that can be counted; all of them where it has no more than n.

    In place of a frame that is damaged stands its nearest neighbour that can be decoded, as its `index`
    tells.

    Raises:
        VideoError: as `uniform_indices`, or the reader is a stream without end.
    """
    try:
        total = len(reader)  # type: ignore[arg-type]
    except TypeError as error:
        raise VideoError(
            f"frames of a stream cannot be spread evenly over a length it does not have ({error})"
        ) from None
    indices = uniform_indices(total, n, placement)
    try:
        return reader.get_frames(indices=indices)
    except VideoError:
        table: Any = getattr(reader, "table", None)
        if table is None:
            raise
        return reader.get_frames(seconds=table.seconds[indices].tolist())


@checked
def sample_fps(reader: VideoReader, fps: float, start: float = 0.0, end: float | None = None) -> list[Frame]:
    """The frames on screen at `start`, `start` + 1/fps, ... below `end` (None: the video's end).

    Exact by presentation time, so on variable frame rates too. A frame that stays on screen longer than 1/fps
    comes again.

    Raises:
        VideoError: fps not above 0, a span outside the video, more frames than the reader's limits, or a
            source without random access.
    """
    check_rate(fps)
    if end is None:
        end = reader.duration
        if end is None:
            raise VideoError("the video's duration is unknown; name an end, or read a stream with at_fps")
    if not 0 <= start < end:
        raise VideoError(
            f"cannot sample from {start:g} s to {end:g} s; a span begins at 0 or later and ends after that"
        )
    return reader.get_frames(seconds=instants(reader, fps, start, end).tolist())


def instants(reader: VideoReader, fps: float, start: float, end: float) -> np.ndarray:
    """(n,) seconds: `start`, `start` + 1/fps, ... below `end`.

    Raises:
        VideoError: they are more than the reader's limits on frames.
    """
    span = (end - start) * fps
    excess = getattr(reader, "limits", STANDARD).excess_frames(span)
    if excess:
        raise VideoError(f"{fps:g} frames per second from {start:g} s to {end:g} s are {excess}")
    return start + np.arange(math.ceil(span - 1e-6)) / fps


@checked
def at_fps(frames: Iterable[Frame], fps: float) -> Iterator[Frame]:
    """Thin out a stream of frames without looking ahead: of each 1/fps seconds from 0, the first frame.

    Raises:
        VideoError: fps not above 0.
    """
    check_rate(fps)
    return _thinned(frames, fps)


def _thinned(frames: Iterable[Frame], fps: float) -> Iterator[Frame]:
    last = None
    for frame in frames:
        slot = math.floor(frame.seconds * fps + 1e-6)
        if last is None or slot > last:
            last = slot
            yield frame


def check_rate(fps: float) -> None:
    """Raise VideoError for a rate that is not above 0."""
    if not (fps > 0 and math.isfinite(fps)):
        raise VideoError(f"a frame rate is a number above 0, got {fps!r}")
