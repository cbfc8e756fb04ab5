"""The PyAV reader: files with exact presentation times, streams in passing."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..limits import Held, Limits
from .bitstream import Regularity, regularity
from .errors import VideoError, brief
from .frame import Frame
from .frame_times import Clock, FrameTable, from_packets
from .libav import Damage, decoded, to_rgb
from .picker import Picker
from .random_access import RandomAccess
from .source import Source
from .stream_track import Track

# frames that another package decodes at a time, so that no more than those are held twice
_AT_A_TIME = 8


class PyAVReader:
    """A `VideoReader` over one source.

    Attributes beyond the protocol:
        source: where it reads from.
        limits: bounds on its cost.
        track: its video stream.
    """

    def __init__(self, source: Source, timeout: float, limits: Limits):
        self.source, self.limits, self.track = source, limits, Track(source, timeout, limits)
        self.backend = "pyav"
        self.why = "PyAV reads everything, and compares the time of every frame with the one meant"
        self._picker: Picker | None = None
        self._clock, self._passed = Clock(self.fps), 0

    @property
    def fps(self) -> float:
        return self.track.fps

    @property
    def damage(self) -> Damage:
        """Counts of packets and frames that PyAV could not decode so far, and skipped."""
        return self.track.damage

    @cached_property
    def duration(self) -> float | None:
        stated = self.track.stated_duration
        if self._in_passing:
            return stated
        last = float(self.table.seconds[-1])
        return stated if stated is not None and stated > last else last + 1 / self.fps

    @cached_property
    def table(self) -> FrameTable:
        """Presentation times of all frames.

        The file is read through once, and decoded if its packets do not tell the times.

        Raises:
            VideoError: a stream without end, or no frame in it.
        """
        track = self.track
        track.check()
        track.watch.start()
        if self.source.live or (self._in_passing and track.stated_duration is None):
            raise VideoError(
                f"{self.source.name!r} is a stream: its frames can be iterated over, not counted or picked"
            )
        track.rewind()
        found = from_packets(self._counted(track.packets()), track.time_base, track.origin)
        if found is None:
            track.rewind()
            clock = Clock(self.fps, keep=True)
            frames = self._counted(decoded(track.packets(), self.damage, self.limits))
            found = FrameTable(np.asarray([clock(frame.time) for frame in frames]))
        if not len(found):
            raise self._nothing()
        return found

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) of the first frame, turned upright."""
        found = self.track.upright
        if found is None:
            raise self._nothing()
        return found

    @cached_property
    def regularity(self) -> Regularity:
        """What other packages need to know of a file's packets, all of which are read through for it."""
        self.track.rewind()
        return regularity(self._counted(self.track.packets()))

    def __len__(self) -> int:
        try:
            return len(self.table)
        except VideoError as error:
            raise TypeError(str(error)) from error

    def __iter__(self) -> Iterator[Frame]:
        self.track.check()
        return self._bounded(self._pass() if self._in_passing else self._read())

    def get_frames(
        self, indices: Sequence[int] | None = None, *, seconds: Sequence[float] | None = None
    ) -> list[Frame]:
        """See `VideoReader`.

        For a time at which the frame on screen is damaged: the nearest one before it (else after it) that can
        be decoded; its `index` and `seconds` tell.
        """
        self.track.check()
        if (indices is None) == (seconds is None):
            raise VideoError("get_frames takes either indices or seconds")
        self.track.watch.start()
        if indices is not None:
            wanted = self._checked(indices)
        else:
            wanted = self.table.on_screen(self._within(seconds or ())).tolist()
        found = dict(self._picked(sorted(set(wanted)), exact=indices is not None))
        return [found[i] for i in wanted]

    def each(self, indices: Iterable[int], size: tuple[int, int] | None = None) -> Iterator[Frame]:
        """The frames at `indices` in ascending order, each once, decoded while they are asked for.

        Args:
            size: (height, width) to which libav scales (bicubic) while it converts to RGB; None for the
                frames' own. Only PyAV scales.

        Raises:
            VideoError: as `get_frames`, or another package decodes this file and a size is given.
        """
        self.track.check()
        self.track.watch.start()
        if size and self._picker is not None:
            raise VideoError(f"{self.backend} scales no frames here; ask for backend='pyav'")
        wanted = sorted(set(self._checked(indices)))
        return (frame for _, frame in self._picked(wanted, exact=True, size=size))

    def close(self) -> None:
        """Release the source. Closing twice is harmless; reading afterwards raises VideoError."""
        self.track.close()
        if self._picker is not None:
            self._picker.close()
            self._picker = None

    def __enter__(self) -> PyAVReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def use(self, picker: Picker, why: str) -> PyAVReader:
        """Leave random access to another package; iteration and failed frames stay with PyAV."""
        self._picker, self.backend, self.why = picker, picker.name, why
        return self

    @property
    def _in_passing(self) -> bool:
        """Whether iteration reads the source directly, without reading it through for its times first."""
        return self.source.live or self.source.kind == "network"

    def _bounded(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """The same frames, while those held by the caller are not too large together."""
        held = Held()
        for frame in frames:
            self._afford(held.count + 1, held.nbytes + frame.image.nbytes)
            held.add(frame.image)
            yield frame
            del frame

    def _pass(self) -> Iterator[Frame]:
        track = self.track
        if not self.source.live and track.stated_duration is not None:
            track.rewind()
            self._clock, self._passed = Clock(self.fps), 0
        turn = track.turn
        track.watch.start()
        for frame in decoded(track.packets(live=True), self.damage, self.limits):
            seconds = self._clock(frame.time)
            if seconds is not None:
                self._passed += 1
                yield Frame(to_rgb(frame), seconds, self._passed - 1)
                track.watch.start()
            if track.turn != turn:
                raise VideoError(f"{self.source.name!r} was closed or searched while it was iterated over")

    def _read(self) -> Iterator[Frame]:
        ordinal = -1
        while True:
            run = self._access.frames_from(ordinal + 1)
            self.track.watch.start()
            for ordinal, frame in run:
                turn = self.track.turn
                yield self._frame(ordinal, frame)
                self.track.watch.start()
                if self.track.turn != turn:
                    break  # frames were picked meanwhile; go on after the last one given
            else:
                break
        if ordinal < 0:
            raise self._nothing()

    @cached_property
    def _access(self) -> RandomAccess:
        return RandomAccess(self.track, self.table)

    def _frame(self, ordinal: int, frame: Any, size: tuple[int, int] | None = None) -> Frame:
        still = None if ordinal or size else self.track.still()
        image = to_rgb(frame, size) if still is None else still
        return Frame(image, float(self.table.seconds[ordinal]), ordinal)

    def _nothing(self, where: str = "") -> VideoError:
        """The error of a source without frames; a too large picture is not decoded even for its size."""
        most, size = self.limits.pixels, self.track.size
        perhaps = ""
        if most is not None and not all(size):
            perhaps = (
                f", or its pictures have more than {most:,} pixels, which limits=Limits(pixels=None) allows"
            )
        return VideoError(f"{self.source.name!r} holds no frame that can be decoded{where}{perhaps}")

    def _counted(self, frames: Iterable[Any]) -> Iterator[Any]:
        """The same frames or packets, up to the limit on their number."""
        for count, frame in enumerate(frames, 1):
            excess = self.limits.excess_frames(count)
            if excess:
                raise VideoError(f"{self.source.name!r} holds {excess}")
            yield frame

    def _afford(self, count: int, nbytes: int) -> None:
        excess = self.limits.excess_bytes(nbytes, count)
        if excess:
            raise VideoError(f"{self.source.name!r}: {excess}")

    def _checked(self, indices: Iterable[int]) -> list[int]:
        total, wanted = len(self.table), []
        for index in indices:
            try:
                wanted.append(operator.index(index))
            except TypeError:
                raise VideoError(f"a frame's index is an integer, got {index!r}") from None
            if not 0 <= wanted[-1] < total:
                raise VideoError(f"{self.source.name!r} has no frame {index}, only frames 0 to {total - 1}")
        return wanted

    def _within(self, seconds: Iterable[float]) -> list[float]:
        end = max(self.duration or 0.0, float(self.table.seconds[-1]) + 1 / self.fps)
        times = [float(t) for t in seconds]
        for t in times:
            if not -1e-6 <= t <= end + 1e-6:
                raise VideoError(f"{t:g} s lies outside {self.source.name!r}, which lasts {end:.3f} s")
        return times

    def _picked(
        self, ordinals: list[int], exact: bool, size: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, Frame]]:
        """(wanted, frame) for ascending ordinals; `exact` raises for a damaged frame."""
        height, width = size or self.track.size[::-1]
        self._afford(len(ordinals), 3 * width * height * len(ordinals))
        done = 0
        if self._picker is not None:
            for frame in self._by_picker(ordinals):
                done += 1
                yield frame.index, frame
        nbytes = 0
        for count, (wanted, found) in enumerate(self._access.pick(ordinals[done:]), done + 1):
            if found is None:
                raise self._nothing(f" around {self.table.seconds[wanted]:.3f} s")
            if exact and found[0] != wanted:
                name, way = repr(self.source.name), "get_frames(seconds=...) shows its neighbour"
                raise VideoError(f"frame {wanted} of {name} is damaged; {way}")
            frame = self._frame(*found, size)
            nbytes += frame.image.nbytes
            self._afford(count, nbytes)
            yield wanted, frame

    def _by_picker(self, ordinals: list[int]) -> Iterator[Frame]:
        """Frames by the other package, up to the first that it cannot decode; it is left then."""
        for start in range(0, len(ordinals), _AT_A_TIME):
            part = ordinals[start : start + _AT_A_TIME]
            assert self._picker is not None
            try:
                images = self._picker.images(part)
            except VideoError as error:
                self._picker.close()
                self.why = f"PyAV, because {self.backend} failed: {brief(error)}"
                self._picker, self.backend = None, "pyav"
                return
            for ordinal, image in zip(part, images, strict=True):
                yield Frame(image, float(self.table.seconds[ordinal]), ordinal)
