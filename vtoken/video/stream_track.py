"""The video stream of an opened source, and seeking in it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from typing import Any

from ..limits import Limits, Watch
from .errors import VideoError
from .libav import Damage, decoded, open_container, orientation, packets, seek
from .source import Source
from .still import still_of


class Track:
    """One video stream. Rewinding replaces libav's objects, so no other object may hold them.

    Attributes:
        limits: bounds on its pictures.
        watch: the time left to the current call; its owner starts it.
        damage: counts of packets and frames that could not be decoded.
        turn: number of seeks so far; an iterator that finds it changed has lost its place.
    """

    def __init__(self, source: Source, timeout: float, limits: Limits):
        self.source, self.timeout, self.limits = source, timeout, limits
        self.watch = Watch(limits.seconds)
        self.damage, self.turn = Damage(), 0
        self._unread = True
        self._container, self._stream = open_container(source, limits, timeout=timeout, live=source.live)

    @cached_property
    def format(self) -> set[str]:
        """libav's names of the container, such as {"mov", "mp4", "m4a", "3gp", "3g2", "mj2"}."""
        self.check()
        return set(self._container.format.name.split(","))

    @cached_property
    def fps(self) -> float:
        """Mean frame rate; 25, libav's own guess, where the source does not say."""
        self.check()
        s = self._stream
        return next(
            (float(r) for r in (s.average_rate, s.guessed_rate, s.base_rate) if r and 0 < r <= 1000), 25.0
        )

    @cached_property
    def stated_duration(self) -> float | None:
        """Seconds that the container says it lasts, None where it does not say."""
        self.check()
        container, stream = self._container, self._stream
        if self.source.live:
            return None
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        if not container.duration or container.duration < 0:
            return None
        # the duration of Matroska and FLV is the time of the end
        late = max(container.start_time or 0, 0) if {"matroska", "flv"} & self.format else 0
        return (container.duration - late) / 1e6

    @cached_property
    def fragmented(self) -> bool:
        """Whether this is an mp4 without one index of all frames."""
        self.check()
        return "mp4" in self.format and not self._stream.frames

    @cached_property
    def turned(self) -> bool | None:
        """Whether the first frame has a display matrix that turns or mirrors it; None if none decodes."""
        return None if self._first is None else self._first[0] != (False, 1, 1)

    @property
    def upright(self) -> tuple[int, int] | None:
        """(height, width) of the first frame, turned upright; None if none decodes."""
        if self._first is None:
            return None
        (transpose, _, _), height, width = self._first
        return (width, height) if transpose else (height, width)

    @cached_property
    def _first(self) -> tuple[tuple[bool, int, int], int, int] | None:
        """Orientation, height and width of the first frame."""
        self.rewind()
        first = next(decoded(self.packets(), self.damage, self.limits), None)
        return None if first is None else (orientation(first), first.height, first.width)

    @property
    def time_base(self) -> Any:
        """Seconds of one unit of pts, a Fraction."""
        self.check()
        return self._stream.time_base

    @property
    def origin(self) -> int | None:
        """pts of the start of the container, None where it has none."""
        self.check()
        start = self._container.start_time
        return None if start is None else round(start / 1e6 / self._stream.time_base)

    def packets(self, live: bool = False) -> Iterator[Any]:
        """Packets from the current place, see `libav.packets`. VideoError once the call takes too long."""
        self.check()
        self._unread = False
        return self._watched(packets(self._container, self._stream, self.damage, live=live))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of its pictures, 0 where the source does not say."""
        self.check()
        return self._stream.width, self._stream.height

    def still(self) -> Any:
        """(h, w, 3) uint8 of the first picture of a file of stills, else None, see `still_of`."""
        self.check()
        return still_of(self.source, self._container, self.limits)

    def packets_from(self, key: int) -> Iterator[Any]:
        """Packets from the key frame with pts `key`, or from an earlier one if libav cannot seek there."""
        second = round(1 / self.time_base)
        for target in (key, key - second, key - 10 * second):
            if not self._seek(target):
                break
            run = self.packets()
            for packet in run:
                if packet.is_keyframe and packet.pts is not None:
                    if packet.pts <= key:
                        return chain([packet], run)
                    break
        self.rewind()
        return self.packets()

    def rewind(self) -> None:
        """Go back to the first packet, in a new container: a seek to its start loses packets of MPEG-TS."""
        self.check()
        self.turn += 1
        if not self._unread:
            self._container.close()
            self._container, self._stream = open_container(self.source, self.limits, timeout=self.timeout)
            self._unread = True

    def check(self) -> None:
        """Raise VideoError once the track is closed."""
        if self._container is None:
            raise VideoError(f"the reader of {self.source.name!r} is closed")

    def close(self) -> None:
        """Release the source; harmless when closed."""
        if self._container is not None:
            self.turn += 1
            self._container.close()
            self._container = self._stream = None

    def _seek(self, pts: int) -> bool:
        self.check()
        self.turn += 1
        return seek(self._container, self._stream, pts)

    def _watched(self, arriving: Iterator[Any]) -> Iterator[Any]:
        for packet in arriving:
            if self.watch.over:
                raise VideoError(
                    f"reading {self.source.name!r} takes more than {self.watch.seconds:g} s; if you can wait,"
                    " lift that with limits=Limits(seconds=None)"
                )
            yield packet
