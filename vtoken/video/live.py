"""`LiveReader`: the newest frames of a source that does not wait."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..limits import STANDARD, Limits, given
from .buffer import Buffer
from .errors import Unreadable, VideoError, brief, checked
from .frame import Frame
from .frame_times import Clock
from .growing_files import Stopped
from .live_feeds import Picture, feed_of

_LEAP = 10.0  # seconds by which a live clock may run ahead before it counts as set anew
_LONGEST = 30.0  # seconds between two tries


@dataclass
class LiveStats:
    """Counts of frames that a live reader has read, dropped and lost so far.

    Attributes:
        read: pictures that arrived.
        kept: of those, how many were converted and queued, at the wanted frame rate.
        dropped: queued frames that were thrown out unread for newer ones.
        late: pictures that came out of order and were left out.
        jumps: times that the stream's clock was set anew.
        damaged: packets and pictures that could not be decoded.
        reconnects: tries to connect after the first.
        error: the last failure, None if there was none.
        connected: whether pictures are arriving.
    """

    read: int = 0
    kept: int = 0
    dropped: int = 0
    late: int = 0
    jumps: int = 0
    damaged: int = 0
    reconnects: int = 0
    error: str | None = None
    connected: bool = False


class LiveReader:
    """Reads a source in its own thread and keeps the newest frames, however slowly they are taken.

    Frames come in order: `seconds` and `index` strictly increase, over disconnections and clocks that jump.
    `index` counts the pictures that arrived in order, so that gaps show what was dropped or not wanted.
    Memory is bounded by `queue` frames and `max_bytes`.

        with LiveReader("rtsp://camera/stream", fps=2) as live:
            for frame in live:
                session.push(frame.image, frame.seconds)

    Args:
        source: address (rtsp, http, hls, ...), camera, pipe, file, file object, "synthetic://SEED", a
            `VideoReader`, any iterable of `Frame`, (image, seconds) or images, or a function that returns
            such an iterable and is called again when it raises.
        fps: frames per second wanted; the others are not even converted. All where None.
        queue: frames that wait at most; beyond that the oldest is dropped.
        drop: False makes the source wait instead of dropping frames, for recordings.
        timeout: seconds that a source may stay silent, or send nothing that can be decoded, before it counts
            as broken.
        retries: tries in a row without a picture after which it is given up; None for never.
        backoff: seconds before the second try, doubled with each one up to 30.
        speed: recordings (files, iterables) play this many times as fast as they were made; None for as fast
            as can be.
        growing: the file is still being written; its end is where nothing has been added for `timeout`
            seconds.
        max_bytes: bytes of all waiting frames together; one frame may wait however large it is.
        format, options, limits: as `open_video`; of the limits, `pixels` and, for the next picture of a file,
            `seconds` count: the others bound what is held at once, as `queue` and `max_bytes` do here.

    Raises:
        VideoError: the source does not exist, or an argument is out of range. What goes wrong later is raised
            by `read`.
    """

    why = "a live source is read in passing"
    duration = None

    @checked
    def __init__(
        self,
        source: Any,
        *,
        fps: float | None = None,
        queue: int = 8,
        drop: bool = True,
        timeout: float = 10.0,
        retries: int | None = 5,
        backoff: float = 0.5,
        speed: float | None = 1.0,
        growing: bool = False,
        max_bytes: int = 2**28,
        format: str | None = None,
        options: dict[str, str] | None = None,
        limits: Limits | None = STANDARD,
    ):
        ranges = {"fps": fps, "queue": queue, "timeout": timeout, "backoff": backoff, "speed": speed}
        for name, value in ranges.items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise VideoError(f"{name} is a number above 0, got {value!r}")
        if retries is not None and retries < 0:
            raise VideoError(f"retries is a number of tries, 0 or more, got {retries!r}")
        self._wanted, self._timeout, self._backoff = fps, timeout, backoff
        self._retries = math.inf if retries is None else retries
        self._stop, self._buffer = threading.Event(), Buffer(queue, max_bytes, drop)
        self._stats = LiveStats()
        self._failure: VideoError | None = None
        self._feed, self._recorded = feed_of(
            source, timeout, self._stop, growing, format, options, given(limits)
        )
        self._speed = speed if self._recorded else None
        self._clock: Clock | None = None
        self._start = self._arrived = 0.0  # of the real clock: first picture, last picture
        self._time: float | None = None  # the source's own time of the last picture
        self._index = 0
        self._slot = -1  # of 1/fps seconds, of the last frame kept
        self._thread = threading.Thread(target=self._work, name=f"vtoken live {self._feed.name}", daemon=True)
        self._thread.start()

    @property
    def fps(self) -> float:
        """The wanted frame rate, or the source's; NaN until it is known."""
        return self._wanted or self._feed.fps or math.nan

    @property
    def backend(self) -> str:
        """The decoder: "pyav", or "frames" for decoded pictures."""
        return self._feed.backend

    @property
    def ended(self) -> bool:
        """Whether no frame waits and none will come."""
        return self._buffer.ended

    @property
    def stats(self) -> LiveStats:
        """A copy of the current counts."""
        damage, clock = self._feed.damage, self._clock
        damaged = self._stats.damaged + damage.packets + damage.frames
        jumps = clock.jumps if clock else 0
        return replace(self._stats, dropped=self._buffer.dropped, jumps=jumps, damaged=damaged)

    def read(self, timeout: float | None = None, newest: bool = False) -> Frame | None:
        """The oldest frame that waits, or the newest one (older ones then count as dropped).

        Waits for one, at most `timeout` seconds. None where none came in time or the source has ended (see
        `ended`).

        Raises:
            VideoError: the source was given up, and all frames that it gave are read.
        """
        frame = self._buffer.take(timeout, newest)
        if frame is None and self._failure is not None and self._buffer.ended:
            raise self._failure
        return frame

    def __iter__(self) -> Iterator[Frame]:
        while (frame := self.read()) is not None:
            yield frame

    def get_frames(
        self, indices: Sequence[int] | None = None, *, seconds: Sequence[float] | None = None
    ) -> list[Frame]:
        """Always raises VideoError: past frames are gone."""
        raise VideoError(f"{self._feed.name!r} is read live: its frames can be iterated over, not picked")

    def close(self) -> None:
        """End the thread and drop the frames that wait.

        Returns at once, except while libav waits for a network: that takes up to `timeout` seconds. An
        iterable that blocks cannot be interrupted: after `timeout` seconds its thread is abandoned, with a
        RuntimeWarning.
        """
        self._stop.set()
        self._buffer.shut(forget=True)
        self._thread.join(self._timeout + 1)
        if self._thread.is_alive():
            warnings.warn(
                f"{self._feed.name!r} blocks; its thread was left behind", RuntimeWarning, stacklevel=2
            )

    def __enter__(self) -> LiveReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            self._connect()
        finally:
            self._stats.connected = False
            self._feed.close()
            self._buffer.shut()

    def _connect(self) -> None:
        """Make one connection after another, until the source ends or is given up."""
        stats, tries = self._stats, 0
        while not self._stop.is_set():
            before = stats.read
            try:
                self._play(self._feed.connect())
                return
            except Stopped:
                return
            except Exception as error:  # iterables may raise anything
                stats.error, stats.connected = brief(error), False
                tries = 1 if stats.read > before else tries + 1
                if not self._feed.again or isinstance(error, Unreadable) or tries > self._retries:
                    self._failure = self._given_up(error, tries)
                    return
            self._stop.wait(min(self._backoff * 2 ** min(tries - 1, 16), _LONGEST))
            stats.reconnects += 1

    def _given_up(self, error: Exception, tries: int) -> VideoError:
        if tries > 1:
            return VideoError(
                f"{self._feed.name!r} gave no picture in {tries} tries; the last: {brief(error)}"
            )
        if isinstance(error, VideoError):
            return error
        return VideoError(f"{self._feed.name!r} broke off: {type(error).__name__}: {brief(error)}")

    def _play(self, pictures: Iterator[Picture]) -> None:
        """Queue the pictures of one connection."""
        known, fresh = self._time, True
        for picture in pictures:
            if self._stop.is_set():
                return
            self._stats.read += 1
            self._stats.connected = True
            if (
                self._feed.replays
                and known is not None
                and picture.time is not None
                and picture.time <= known
            ):
                continue
            seconds = self._seconds(picture.time, fresh and not self._feed.replays)
            fresh, self._time = False, picture.time
            if seconds is None:
                self._stats.late += 1
            else:
                self._offer(picture, seconds)

    def _seconds(self, time_: float | None, fresh: bool) -> float | None:
        """Time of a picture on one clock for all connections."""
        now = time.monotonic()
        if self._clock is None:
            leap = math.inf if self._recorded else _LEAP
            self._clock, self._start, self._arrived = Clock(self._feed.fps or 25.0, leap), now, now
        elif fresh:
            self._clock.restart()
        passed, self._arrived = 0.0 if self._recorded else now - self._arrived, now
        return self._clock(time_, passed)

    def _offer(self, picture: Picture, seconds: float) -> None:
        index, self._index = self._index, self._index + 1
        if self._wanted is not None:
            slot = math.floor(seconds * self._wanted + 1e-6)
            if slot <= self._slot:
                return
            self._slot = slot
        if self._speed is not None:
            self._stop.wait(self._start + seconds / self._speed - time.monotonic())
        try:
            image = picture.image()
        except Exception as error:  # a pixel format that swscale cannot convert, say
            self._stats.error = brief(error)
            self._stats.damaged += 1
            return
        self._stats.kept += 1
        self._buffer.put(Frame(image, seconds, index))
