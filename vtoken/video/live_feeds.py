"""Sources of pictures for a live reader, one connection after another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..images import pixels
from ..limits import Limits
from .errors import VideoError
from .frame import Frame
from .growing_files import Waiting
from .libav import Damage, decoded, open_container, packets, to_rgb
from .source import Source, resolve
from .still import still_of

_BARREN = 32  # packets in a row that may bring no picture: more than a decoder holds back


class Picture(NamedTuple):
    """A picture that has arrived: the stream's own time in seconds, and a function that makes RGB of it."""

    time: float | None
    image: Callable[[], np.ndarray]


class Feed:
    """Connections to one source.

    Attributes:
        name: its name in messages.
        backend: its decoder.
        again: whether a connection that breaks off can be made again.
        replays: whether a new connection begins at the start, so that known pictures must be skipped.
        fps: frame rate, None until it is known.
        damage: what could not be decoded.
    """

    name = "frames"
    backend = "frames"
    again = False
    replays = False
    fps: float | None = None

    def __init__(self) -> None:
        self.damage = Damage()

    def connect(self) -> Iterator[Picture]:
        """Pictures of a new connection; ends with the source, raises VideoError if it breaks off."""
        raise NotImplementedError

    def close(self) -> None:
        """Release resources that outlive a connection."""


class Frames(Feed):
    """Pictures from Python code: an iterable, or a function that makes one for each connection.

    Pictures are `Frame`s, (image, seconds) pairs or bare arrays.
    """

    def __init__(self, source: Any, limits: Limits):
        super().__init__()
        self._limits = limits
        self._source, self.again = source, callable(source)
        self.fps = getattr(source, "fps", None)
        self.name = getattr(source, "__name__", None) or type(source).__name__

    def connect(self) -> Iterator[Picture]:
        for item in self._source() if self.again else self._source:
            yield _picture(item, self._limits)


class Libav(Feed):
    """Sources of libav: network, devices, pipes, growing files, and files from start to end."""

    backend = "pyav"

    def __init__(self, source: Source, timeout: float, stop: threading.Event, growing: bool, limits: Limits):
        super().__init__()
        self._limits = limits
        self._source, self._timeout, self._stop = source, timeout, stop
        self._file = (
            Waiting(source.path or source.target, timeout, stop) if growing or source.kind == "pipe" else None
        )
        self.name, self.again = source.name, source.kind not in ("file", "object") or growing

    def connect(self) -> Iterator[Picture]:
        source = replace(self._source, target=self._file, kind="object") if self._file else self._source
        container, stream = open_container(
            source, self._limits, timeout=self._timeout, live=True, stop=self._stop
        )
        try:
            rate = stream.average_rate or stream.guessed_rate
            self.fps = float(rate) if rate and rate <= 1000 else None
            self.replays = source.kind == "network" and bool(container.duration)
            still = still_of(source, container, self._limits)  # of the first picture
            arriving = packets(container, stream, self.damage, live=self.again)
            for frame in self._watched(arriving):
                yield Picture(
                    frame.time, partial(to_rgb, frame) if still is None else partial(np.copy, still)
                )
                still = None
            if self._source.kind in ("network", "device") and not self.replays:
                raise VideoError("the stream was ended at its source")
        finally:
            container.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _watched(self, arriving: Iterable[Any]) -> Iterator[Any]:
        """Frames; VideoError if packets keep coming without any frame."""
        since, barren = time.monotonic(), 0

        def fresh() -> Iterator[Any]:
            nonlocal barren
            for packet in arriving:
                if self._stop.is_set():
                    return
                barren += 1
                if barren > _BARREN and time.monotonic() - since > self._timeout:
                    raise VideoError(
                        f"no picture within {self._timeout:g} s, only data that cannot be decoded"
                    )
                yield packet

        for frame in decoded(fresh(), self.damage, self._limits):
            yield frame
            since, barren = time.monotonic(), 0


def _picture(item: Any, limits: Limits) -> Picture:
    if isinstance(item, Frame):
        return Picture(item.seconds, lambda: item.image)
    image, seconds = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    try:
        array = pixels(image, limits)
    except (TypeError, ValueError) as error:
        text = str(error).rstrip(".")
        raise VideoError(text[0].lower() + text[1:]) from error
    return Picture(None if seconds is None else float(seconds), lambda: array)


def feed_of(
    source: Any,
    timeout: float,
    stop: threading.Event,
    growing: bool,
    format: str | None,
    options: dict[str, str] | None,
    limits: Limits,
) -> tuple[Feed, bool]:
    """The feed of a user's source, and whether it is a recording, which plays at its own speed.

    Raises:
        VideoError: as `resolve`, or a source that cannot be played.
    """
    if isinstance(source, str) and source.startswith("synthetic://"):
        from .synthetic import from_address

        source = from_address(source)
    if callable(source) or (
        hasattr(source, "__iter__") and not isinstance(source, str) and not hasattr(source, "read")
    ):
        return Frames(source, limits), not callable(source)
    found = resolve(source, format, options, growing)
    if growing and found.kind != "file":
        raise VideoError(f"growing=True is for a file on disk; {found.name!r} is a {found.kind}")
    recorded = found.kind in ("file", "object") and not (growing or found.live)
    return Libav(found, timeout, stop, growing, limits), recorded
