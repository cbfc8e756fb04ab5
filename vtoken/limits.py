"""Bounds on the memory and time that one file, picture or stream may take in the reader."""

from __future__ import annotations

import math
import time
import weakref
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Upper bounds on the cost of a source.

    A source declares its own size, and a few hundred bytes can declare any size.

    ``limits=None`` lifts all of them in functions that take limits; None as a value lifts one.

    Attributes:
        pixels: pixels of one picture; the default is twice an 8K frame.
        frames: frames of a video, and frames requested by one call.
        nbytes: bytes of all pictures that one call returns, or of those from one iteration that are held at a
            time.
        seconds: duration of one call, or of one step of an iteration.

    Raises:
        ValueError: a value that is neither a number above 0 nor None.
    """

    pixels: int | None = 2**26
    frames: int | None = 2**22
    nbytes: int | None = 2**31
    seconds: float | None = 600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"limits: {field.name} is a number above 0, or None to lift it, found {value!r}."
                )

    def excess_pixels(self, width: int, height: int) -> str | None:
        """The error for a picture of this size, None if it is within the limit."""
        if self.pixels is None or width * height <= self.pixels:
            return None
        return (
            f"has pictures of {width} x {height} pixels, more than {self.pixels:,}; if you trust it, lift"
            " that with limits=Limits(pixels=None)"
        )

    def excess_frames(self, count: float) -> str | None:
        """The error for this many frames, None if they are within the limit."""
        if self.frames is None or count <= self.frames:
            return None
        return f"more than {self.frames:,} frames; if you trust it, lift that with limits=Limits(frames=None)"

    def excess_bytes(self, nbytes: int, count: int) -> str | None:
        """The error for `count` frames of so many bytes together, None if they are within the limit."""
        if self.nbytes is None or nbytes <= self.nbytes:
            return None
        return (
            f"{count} frames take {nbytes / 2**30:.1f} GiB, more than {self.nbytes / 2**30:.1f}; ask for"
            " fewer at a time, or lift that with limits=Limits(nbytes=None)"
        )


class Held:
    """The arrays from one iteration that are still referenced, as `list(reader)` references all of them.

    Attributes:
        count, nbytes: their number, and their bytes together.
    """

    def __init__(self) -> None:
        self.count = self.nbytes = 0

    def add(self, array: Any) -> None:
        """Count an array until it is freed."""
        self.count, self.nbytes = self.count + 1, self.nbytes + array.nbytes
        weakref.finalize(array, self._free, array.nbytes).atexit = False

    def _free(self, nbytes: int) -> None:
        self.count, self.nbytes = self.count - 1, self.nbytes - nbytes


STANDARD, UNLIMITED = Limits(), Limits(None, None, None, None)


def given(limits: Limits | None) -> Limits:
    """The limits of an argument ``limits=``; None means no limits.

    Raises:
        TypeError: for anything else.
    """
    if limits is None:
        return UNLIMITED
    if not isinstance(limits, Limits):
        raise TypeError(f"limits= is a vtoken.video.Limits or None, found {type(limits).__name__}.")
    return limits


class Watch:
    """Remaining time of one call.

    Args:
        seconds: allowed duration, None for no bound.
    """

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self.start()

    def start(self) -> None:
        """Begin a new call."""
        self._end = math.inf if self.seconds is None else time.monotonic() + self.seconds

    @property
    def over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() > self._end
