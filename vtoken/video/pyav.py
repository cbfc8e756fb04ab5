"""The PyAV reader: files with exact presentation times, streams in passing."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np

from ..limits import Held, Limits
from .errors import VideoError, brief
from .frame import Frame
from .frame_times import Clock, FrameTable, from_packets
from .libav import Damage, decoded, to_rgb
from .source import Source
from .stream_track import Track

# key frames that the decoder goes back where it cannot decode a frame from the nearest
_FURTHER = (1, 2, 4, 8)


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


class PyAVReader:
    """A `VideoReader` over one source.

    Attributes beyond the protocol:
        source: where it reads from.
        limits: bounds on its cost.
        track: its video stream.
    """

    def __init__(self, source: Source, timeout: float, limits: Limits):
        self.source, self.limits, self.track = source, limits, Track(source, timeout, limits)
        self.backend, self.why = "pyav", "PyAV reads everything"
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
        found = self._pick(sorted(set(wanted)), exact=indices is not None)
        return [found[i] for i in wanted]

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
            run = self._frames_from(ordinal + 1)
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

    def _frame(self, ordinal: int, frame: Any) -> Frame:
        still = None if ordinal else self.track.still()
        return Frame(to_rgb(frame) if still is None else still, float(self.table.seconds[ordinal]), ordinal)

    def _nothing(self, where: str = "") -> VideoError:
        """The error of a source without frames; a too large picture is not decoded even for its size."""
        most, size = self.limits.pixels, self.track.size
        perhaps = (
            ""
            if most is None or all(size)
            else (
                f", or its pictures have more than {most:,} pixels, which limits=Limits(pixels=None) allows"
            )
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

    def _pick(self, ordinals: list[int], exact: bool) -> dict[int, Frame]:
        width, height = self.track.size
        self._afford(len(ordinals), 3 * width * height * len(ordinals))
        if self._picker is not None:
            try:
                images = self._picker.images(ordinals)
                times = self.table.seconds[ordinals].tolist()
                return {i: Frame(image, t, i) for i, image, t in zip(ordinals, images, times, strict=True)}
            except VideoError as error:
                self._picker.close()
                self.why = f"PyAV, because {self.backend} failed: {brief(error)}"
                self._picker, self.backend = None, "pyav"
        found: dict[int, Frame] = {}
        nbytes = 0
        for wanted, (ordinal, frame) in self._decode(ordinals):
            if exact and ordinal != wanted:
                name = repr(self.source.name)
                raise VideoError(
                    f"frame {wanted} of {name} is damaged; get_frames(seconds=...) shows its neighbour"
                )
            nbytes += 3 * frame.width * frame.height
            self._afford(len(found) + 1, nbytes)
            found[wanted] = self._frame(ordinal, frame)
        return found

    def _decode(self, ordinals: list[int]) -> Iterator[tuple[int, tuple[int, Any]]]:
        """(wanted, (ordinal, frame)) for ascending ordinals; a neighbour where the wanted one is damaged."""
        run: Iterator[tuple[int, Any]] = iter(())
        ahead: tuple[int, Any] | None = None  # the decoder's last frame
        for wanted in ordinals:
            before = None
            if ahead is None or (ahead[0] < wanted and self._key_between(ahead[0], wanted)):
                run = self._frames_from(wanted)
                ahead = next(run, None)
            while ahead is not None and ahead[0] < wanted:
                before, ahead = ahead, next(run, None)
            if ahead is not None and ahead[0] == wanted:
                yield wanted, ahead
                continue
            nearest = self._again(wanted) or before or ahead
            ahead = None  # the track has been moved
            if nearest is None:
                raise self._nothing(f" around {self.table.seconds[wanted]:.3f} s")
            yield wanted, nearest

    def _again(self, wanted: int) -> tuple[int, Any] | None:
        """The last frame up to `wanted` that can be decoded, starting from earlier key frames.

        A picture that is refreshed bit by bit takes more than one of them.
        """
        best: tuple[int, Any] | None = None
        for back in _FURTHER:
            for ordinal, frame in self._frames_from(wanted, back):
                if ordinal > wanted:
                    break
                if best is None or ordinal > best[0]:
                    best = ordinal, frame
            if best is not None and best[0] == wanted:
                break
        return best

    def _key_between(self, at: int, wanted: int) -> bool:
        table = self.table
        return table.pts is not None and table.key_before(wanted) > table.pts[at]

    def _frames_from(self, ordinal: int, back: int = 0) -> Iterator[tuple[int, Any]]:
        """(ordinal, frame) ascending, from `ordinal` on, or from `back` key frames before its own."""
        table = self.table
        if ordinal >= len(table):
            return
        if table.pts is None:
            yield from self._count_from(0 if back else ordinal)
            return
        key = table.key_before(ordinal, back)
        # frames before the key frame refer to frames that were not decoded
        least = (table.ordinal(key) or 0) if back else ordinal
        for frame in decoded(self.track.packets_from(key), self.damage, self.limits):
            place = None if frame.pts is None else table.ordinal(frame.pts)
            if place is not None and place >= least:
                least = place + 1
                yield place, frame

    def _count_from(self, ordinal: int) -> Iterator[tuple[int, Any]]:
        self.track.rewind()
        # decoding damage in another way may bring more frames than were counted
        yield from islice(
            enumerate(decoded(self.track.packets(), self.damage, self.limits)), ordinal, len(self.table)
        )
