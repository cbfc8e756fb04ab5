"""Bounds on what one file, picture or stream may make the reader allocate and do."""

from __future__ import annotations

import math
import time
import weakref
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What a source may cost at most. A source says itself how large it is, and a few hundred bytes can say
    anything.

    ``limits=None`` lifts all of them where a function takes limits, None as a value lifts one.

    Attributes:
        pixels: of one picture; the default is twice an 8K frame.
        frames: that a video may have, and that one call may ask for.
        nbytes: bytes of all pictures that one call returns, or of those from one iteration that are held at a
            time.
        seconds: that one call, or one step of an iteration, may take.

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
        """What is wrong with a picture of this size, None where nothing is."""
        if self.pixels is None or width * height <= self.pixels:
            return None
        return (
            f"has pictures of {width} x {height} pixels, more than {self.pixels:,}; if you trust it, lift"
            " that with limits=Limits(pixels=None)"
        )

    def excess_frames(self, count: float) -> str | None:
        """What is wrong with this many frames, None where nothing is."""
        if self.frames is None or count <= self.frames:
            return None
        return f"more than {self.frames:,} frames; if you trust it, lift that with limits=Limits(frames=None)"

    def excess_bytes(self, nbytes: int, count: int) -> str | None:
        """What is wrong with `count` frames that take so many bytes together, None where nothing is."""
        if self.nbytes is None or nbytes <= self.nbytes:
            return None
        return (
            f"{count} frames take {nbytes / 2**30:.1f} GiB, more than {self.nbytes / 2**30:.1f}; ask for"
            " fewer at a time, or lift that with limits=Limits(nbytes=None)"
        )


class Held:
    """The arrays from one iteration that somebody still holds, as `list(reader)` holds all of them.

    Attributes:
        count, nbytes: how many there are, and their bytes together.
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
    """The limits of an argument ``limits=``, of which None means none.

    Raises:
        TypeError: for anything else.
    """
    if limits is None:
        return UNLIMITED
    if not isinstance(limits, Limits):
        raise TypeError(f"limits= is a vtoken.video.Limits or None, found {type(limits).__name__}.")
    return limits


class Watch:
    """The time that one call has left.

    Args:
        seconds: that it may take, None for ever.
    """

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self.start()

    def start(self) -> None:
        """A new call begins."""
        self._end = math.inf if self.seconds is None else time.monotonic() + self.seconds

    @property
    def over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() > self._end
