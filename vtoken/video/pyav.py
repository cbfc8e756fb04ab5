"""The reader over PyAV: every file, exactly by presentation time, and every stream, in passing."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import numpy as np

from .errors import VideoError, brief
from .libav import Damage, decoded, open_container, orientation, packets, to_rgb
from .reader import Frame
from .source import Source
from .table import Clock, FrameTable, from_packets


class Picker(Protocol):
    """Another package's random access, for files whose frames it numbers as the table does."""

    name: str

    def images(self, ordinals: Sequence[int]) -> list[np.ndarray]:
        """(h, w, 3) uint8 RGB of frames in ascending order; VideoError where one is damaged."""

    def close(self) -> None: ...


def check_count(name: str, count: int, reader: PyAVReader) -> None:
    """Raises VideoError where another package counts other frames than PyAV: then its numbers mean other frames."""
    if count != len(reader.table):
        raise VideoError(f"{name} counts {count} frames in {reader.source.name!r} and PyAV {len(reader.table)}")


class PyAVReader:
    """A `VideoReader` over one source. Attributes beyond the protocol:

    damage: what was skipped so far because it could not be decoded.
    source: where it reads from.
    """

    def __init__(self, source: Source, timeout: float = 10.0):
        self.source, self.timeout, self.damage = source, timeout, Damage()
        self.backend = "pyav"
        self.why = "PyAV, for everything that is not a file" if source.kind != "file" else "PyAV"
        self._container, self._stream = open_container(source, timeout=timeout, live=source.live)
        self._picker: Picker | None = None
        self._unread = True  # nothing has been demuxed yet
        self._turn = 0  # how often the container has been moved
        self._clock, self._passed = Clock(self.fps), 0

    @cached_property
    def fps(self) -> float:
        s = self._stream
        for rate in (s.average_rate, s.guessed_rate, s.base_rate):
            if rate and 0 < rate <= 1000:
                return float(rate)
        return 25.0  # libav's own guess where a source does not say

    @cached_property
    def duration(self) -> float | None:
        stated = self._stated
        if self.source.kind not in ("file", "object") or self.source.live:
            return stated
        last = float(self.table.seconds[-1])
        return stated if stated is not None and stated > last else last + 1 / self.fps

    @cached_property
    def _stated(self) -> float | None:
        """Seconds that the container says it lasts."""
        self._opened()
        container, stream = self._container, self._stream
        if self.source.live:
            return None
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        if not container.duration or container.duration < 0:
            return None
        # what Matroska and FLV call a duration is the time of the end
        late = max(container.start_time or 0, 0) if {"matroska", "flv"} & set(self.container.split(",")) else 0
        return (container.duration - late) / 1e6

    @cached_property
    def container(self) -> str:
        """libav's names of the container, such as "mov,mp4,m4a,3gp,3g2,mj2"."""
        self._opened()
        return self._container.format.name

    @cached_property
    def fragmented(self) -> bool:
        """Whether this is an mp4 without one index of all frames."""
        self._opened()
        return "mp4" in self.container and not self._stream.frames

    @cached_property
    def turned(self) -> bool:
        """Whether the first frame carries a display matrix that turns or mirrors it."""
        self._rewind()
        first = next(decoded(self._packets(), self.damage), None)
        return first is not None and orientation(first) != (False, 1, 1)

    @cached_property
    def table(self) -> FrameTable:
        """When each frame is on screen; the file is read through once, and decoded if its packets do not tell."""
        self._opened()
        if self.source.live or (self.source.kind == "network" and self._stated is None):
            raise VideoError(
                f"{self.source.name!r} is a stream: its frames can be iterated over, not counted or picked"
            )
        self._rewind()
        base, start = self._stream.time_base, self._container.start_time
        found = from_packets(self._packets(), base, None if start is None else round(start / 1e6 / base))
        if found is None:
            self._rewind()
            clock = Clock(self.fps)
            times = [clock(frame.time) for frame in decoded(self._packets(), self.damage)]
            found = FrameTable(np.asarray([t for t in times if t is not None], np.float64))
        if not len(found):
            raise VideoError(f"{self.source.name!r} holds no frame that can be decoded")
        return found

    def __len__(self) -> int:
        try:
            return len(self.table)
        except VideoError as error:
            raise TypeError(str(error)) from error

    def __iter__(self) -> Iterator[Frame]:
        self._opened()
        if self.source.live or self.source.kind == "network":
            yield from self._in_passing()
            return
        ordinal = -1
        while True:
            run = self._frames_from(ordinal + 1)
            for ordinal, frame in run:
                turn = self._turn
                yield Frame(to_rgb(frame), float(self.table.seconds[ordinal]), ordinal)
                if self._turn != turn:
                    break  # frames were picked meanwhile; take up the thread where it was
            else:
                break
        if ordinal < 0:
            raise VideoError(f"{self.source.name!r} holds no frame that can be decoded")

    def get_frames(
        self, indices: Sequence[int] | None = None, *, seconds: Sequence[float] | None = None
    ) -> list[Frame]:
        """See `VideoReader`. For a time at which the frame on screen is damaged, the nearest one before it (or else after it)
        that can be decoded; its `index` and `seconds` tell."""
        self._opened()
        if (indices is None) == (seconds is None):
            raise VideoError("get_frames takes either indices or seconds")
        if indices is not None:
            wanted = self._checked(indices)
        else:
            wanted = self.table.on_screen(self._within(seconds or ())).tolist()
        found = self._pick(sorted(set(wanted)), exact=indices is not None)
        return [found[i] for i in wanted]

    def close(self) -> None:
        """Give the file back. Closing twice is harmless; reading afterwards raises VideoError."""
        if self._container is not None:
            self._turn += 1
            self._container.close()
            self._container = self._stream = None
        if self._picker is not None:
            self._picker.close()
            self._picker = None

    def __enter__(self) -> PyAVReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def use(self, picker: Picker, why: str) -> PyAVReader:
        """Leave random access to another package; iteration and whatever it fails at stay here."""
        self._picker, self.backend, self.why = picker, picker.name, why
        return self

    def _opened(self) -> None:
        if self._container is None:
            raise VideoError(f"the reader of {self.source.name!r} is closed")

    def _checked(self, indices: Iterable[int]) -> list[int]:
        total, wanted = len(self.table), []
        for index in indices:
            try:
                wanted.append(operator.index(index))
            except TypeError:
                raise VideoError(f"a frame's index is an integer, got {index!r}") from None
            if not 0 <= wanted[-1] < total:
                raise VideoError(
                    f"frame {index} of {self.source.name!r} does not exist; it has frames 0 to {total - 1}"
                )
        return wanted

    def _within(self, seconds: Iterable[float]) -> list[float]:
        end = max(self.duration or 0.0, float(self.table.seconds[-1]) + 1 / self.fps)
        times = [float(t) for t in seconds]
        for t in times:
            if not -1e-6 <= t <= end + 1e-6:
                raise VideoError(f"{t:g} s lies outside {self.source.name!r}, which lasts {end:.3f} s")
        return times

    def _pick(self, ordinals: list[int], exact: bool) -> dict[int, Frame]:
        if self._picker is not None:
            try:
                images = self._picker.images(ordinals)
                return {
                    i: Frame(image, float(self.table.seconds[i]), i) for i, image in zip(ordinals, images, strict=True)
                }
            except VideoError as error:
                self.why = f"PyAV, because {self.backend} failed: {brief(error)}"
                self._picker.close()
                self._picker, self.backend = None, "pyav"
        found = {}
        for wanted, (ordinal, frame) in self._decode(ordinals):
            if exact and ordinal != wanted:
                raise VideoError(
                    f"frame {wanted} of {self.source.name!r} is damaged; get_frames(seconds=...) shows its neighbour"
                )
            found[wanted] = Frame(to_rgb(frame), float(self.table.seconds[ordinal]), ordinal)
        return found

    def _decode(self, ordinals: list[int]) -> Iterator[tuple[int, tuple[int, Any]]]:
        """(wanted, (ordinal, frame)) for ascending ordinals; a neighbour where the wanted one is damaged."""
        run: Iterator[tuple[int, Any]] = iter(())
        ahead: tuple[int, Any] | None = None  # what the decoder gave last
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
            ahead = None  # the container has been moved
            if nearest is None:
                raise VideoError(f"{self.source.name!r} cannot be decoded around {self.table.seconds[wanted]:.3f} s")
            yield wanted, nearest

    def _again(self, wanted: int) -> tuple[int, Any] | None:
        """The last frame up to `wanted` that can be decoded, coming from one key frame further back."""
        best = None
        for ordinal, frame in self._frames_from(wanted, back=1):
            if ordinal > wanted:
                break
            best = ordinal, frame
        return best

    def _key_between(self, at: int, wanted: int) -> bool:
        table = self.table
        return table.pts is not None and table.key_before(wanted) > table.pts[at]

    def _frames_from(self, ordinal: int, back: int = 0) -> Iterator[tuple[int, Any]]:
        """(ordinal, frame) in ascending order from `ordinal` on, or from the key frame that is `back` key frames earlier."""
        table, last = self.table, -1
        if ordinal >= len(table):
            return
        if table.pts is None:
            self._rewind()
            clock = Clock(self.fps)
            for frame in decoded(self._packets(), self.damage):
                if clock(frame.time) is not None:
                    last += 1
                    if last >= ordinal or back:
                        yield last, frame
            return
        for frame in decoded(self._packets_from(table.key_before(ordinal, back)), self.damage):
            place = None if frame.pts is None else table.ordinal(frame.pts)
            if place is not None and place > last and (place >= ordinal or back):
                last = place
                yield place, frame

    def _in_passing(self) -> Iterator[Frame]:
        if not self.source.live and self._stated is not None:
            self._rewind()
            self._clock, self._passed = Clock(self.fps), 0
        turn = self._turn
        for frame in decoded(self._packets(live=True), self.damage):
            seconds = self._clock(frame.time)
            if seconds is not None:
                self._passed += 1
                yield Frame(to_rgb(frame), seconds, self._passed - 1)
            if self._turn != turn:
                raise VideoError(f"{self.source.name!r} was closed or searched while it was iterated over")

    def _packets(self, live: bool = False) -> Iterator[Any]:
        self._opened()
        self._unread = False
        return packets(self._container, self._stream, self.damage, live=live)

    def _packets_from(self, key: int) -> Iterator[Any]:
        """Packets from the key frame with pts `key`, or from an earlier one where the container cannot be moved there."""
        second = round(1 / self._stream.time_base)
        for target in (key, key - second, key - 10 * second):
            if not self._seek(target):
                break
            run = self._packets()
            for packet in run:
                if packet.is_keyframe and packet.pts is not None:
                    if packet.pts <= key:
                        return chain([packet], run)
                    break
        self._rewind()
        return self._packets()

    def _seek(self, pts: int) -> bool:
        self._opened()
        self._turn += 1
        try:
            self._container.seek(pts, stream=self._stream)
        except (OSError, ValueError):  # libav's errors are of these kinds
            return False
        return True

    def _rewind(self) -> None:
        """Back to the first packet. A new container, because a seek to the start of a transport stream loses packets."""
        self._opened()
        self._turn += 1
        if not self._unread:
            self._container.close()
            self._container, self._stream = open_container(self.source, timeout=self.timeout)
            self._unread = True
