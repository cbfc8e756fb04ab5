"""Presentation times of the frames of a file or stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .bitstream import hidden, hides_frames

# seconds that a time may lie back and still be a frame out of order rather than a clock set anew
_REORDER = 1.0


@dataclass(frozen=True)
class FrameTable:
    """Presentation times of all frames.

    Attributes:
        seconds: (n,) float64, strictly increasing, 0 at the start of the source.
        pts: (n,) int64 in units of `time_base`, strictly increasing; None where frames can only be counted.
        keys: (k,) int64, pts of those frames at which decoding can start, ascending.
    """

    seconds: np.ndarray
    pts: np.ndarray | None = None
    keys: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def longest_group(self) -> int:
        """Largest number of frames from one key frame to the next."""
        if self.pts is None or self.keys is None:
            return len(self)
        return int(np.diff(np.append(np.searchsorted(self.pts, self.keys), len(self))).max())

    def on_screen(self, seconds: Iterable[float]) -> np.ndarray:
        """(m,) int64: per time the last frame that begins at or before it (within a microsecond), else 0."""
        places = np.searchsorted(self.seconds, np.asarray(list(seconds), np.float64) + 1e-6, side="right") - 1
        return np.maximum(places, 0)

    def ordinal(self, pts: int) -> int | None:
        """Index of the frame with this pts, None where the file names no such frame."""
        assert self.pts is not None
        place = int(np.searchsorted(self.pts, pts))
        return place if place < len(self.pts) and self.pts[place] == pts else None

    def key_before(self, ordinal: int, back: int = 0) -> int:
        """pts of the last key frame at or before a frame, or `back` key frames earlier."""
        assert self.pts is not None and self.keys is not None
        place = int(np.searchsorted(self.keys, self.pts[ordinal], side="right")) - 1 - back
        return int(self.keys[max(place, 0)])


def from_packets(packets: Iterable[Any], time_base: Fraction, origin: int | None) -> FrameTable | None:
    """The table of a file from its packets alone; None for missing, repeated or decreasing times."""
    pts, keys, last = [], [], None
    hides = None
    for packet in packets:
        if hides is None:
            hides = hides_frames(packet)
        if not packet.size or (hides and hidden(packet)):
            continue
        at, decoded_at = packet.pts, packet.dts
        if packet.is_discard:  # cut off at the start, where the first frames may still be decoded from
            if packet.is_keyframe and at is not None:
                keys.append(at)
            continue
        if at is None or (last is not None and decoded_at is not None and decoded_at < last):
            return None
        last = decoded_at if decoded_at is not None else last
        pts.append(at)
        if packet.is_keyframe:
            keys.append(at)
    if not pts or not keys:
        return None
    if max(pts) - min(pts) >= 2**62:  # no clock runs that long, and differences would overflow
        return None
    times = np.unique(np.asarray(pts, np.int64))
    if len(times) != len(pts):
        return None
    start = int(times[0]) if origin is None or origin < times[0] - 2**62 else min(origin, int(times[0]))
    seconds = (times - start).astype(np.float64) * time_base.numerator / time_base.denominator
    return FrameTable(seconds, times, np.unique(np.asarray(keys, np.int64)))


class Clock:
    """Turns the times of a stream into strictly increasing seconds.

    A missing time becomes one frame after the last, or `passed` seconds if that is longer. A slightly earlier
    time is a frame out of order and gives None. A much earlier one, or one later by more than `leap` seconds
    and twice the seconds `passed`, comes from a clock that was set anew: it is treated as missing.

    With `keep`, every frame has a place: after less than a frame's time, it lies half a frame after the last.
    """

    def __init__(self, fps: float, leap: float = float("inf"), keep: bool = False):
        self.interval, self.leap, self.keep = 1.0 / fps, leap, keep
        self.last: float | None = None
        self.jumps = 0
        self._offset: float | None = None

    def __call__(self, time: float | None, passed: float = 0.0) -> float | None:
        """Seconds of a frame with the stream's own `time`, `passed` real seconds after the last frame."""
        if self.last is None:
            self._offset, self.last = -(time or 0.0), 0.0
            return 0.0
        follows = self.last + max(self.interval, passed)
        if time is None:
            self.last = follows
            return self.last
        if self._offset is None:
            self._offset = follows - time
        step = time + self._offset - self.last
        if step < -(self.interval if self.keep else _REORDER) or step > max(self.leap, 2 * passed):
            self.jumps += 1
            self._offset, step = follows - time, follows - self.last
        if step <= 0 and not self.keep:
            return None
        if step <= 0:
            step = self.interval / 2
        self.last += step
        return self.last

    def restart(self) -> None:
        """Prepare for the first frame of a new connection, which has times of its own."""
        self._offset = None
