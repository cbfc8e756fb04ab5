"""`open_video`: one protocol over PyAV, decord and torchcodec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..limits import STANDARD, Limits, given
from .errors import VideoError, checked
from .source import resolve

BACKENDS = ("auto", "pyav", "decord", "torchcodec")


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a video.

    Attributes:
        image: (height, width, 3) uint8, RGB, turned upright where the file carries a rotation.
        seconds: presentation time, 0 at the start of the source.
        index: place in presentation order, 0 first.
    """

    image: np.ndarray
    seconds: float
    index: int


@runtime_checkable
class VideoReader(Protocol):
    """What every back-end offers. `len(reader)` exists too where frames can be counted; a stream raises TypeError.

    Attributes:
        fps: mean frame rate per second.
        duration: seconds, None where it is unknown.
        backend: "pyav", "decord", "torchcodec" or "synthetic".
        why: one sentence: why this back-end.
    """

    fps: float
    duration: float | None
    backend: str
    why: str

    def __iter__(self) -> Iterator[Frame]:
        """Frames in presentation order: `seconds` and `index` strictly increase."""

    def get_frames(
        self, indices: Sequence[int] | None = None, *, seconds: Sequence[float] | None = None
    ) -> list[Frame]:
        """The frames at `indices`, or those on screen at `seconds`, in the order asked for.

        Raises:
            VideoError: an index or time outside the video, a frame that cannot be decoded, a source without random access.
        """

    def close(self) -> None: ...

    def __enter__(self) -> VideoReader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@checked
def open_video(
    source: Any,
    backend: str = "auto",
    *,
    format: str | None = None,
    options: dict[str, str] | None = None,
    timeout: float = 10.0,
    limits: Limits | None = STANDARD,
) -> VideoReader:
    """Open a video for reading. Only what is named is opened: a playlist, which names other files, is refused unless its
    `format` is asked for, except under http, where it may name addresses. See docs/security.md.

    Args:
        source: path, address (http, rtsp, rtmp, srt, tcp, udp), binary file object, camera number, or "synthetic://SEED".
        backend: "auto" takes decord for random access in mp4 and mkv files that it reads right, and PyAV for everything
            else; "pyav", "decord" or "torchcodec" ask for one.
        format: demuxer of libav, None to probe; "lavfi" and "v4l2" name devices.
        options: options of libav for the source, such as {"rtsp_transport": "tcp"}.
        timeout: seconds that a stream of the network may stay silent.
        limits: bounds on pixels, frames, bytes and seconds, None for none. Whatever exceeds them raises VideoError, here or
            when it is read.

    Raises:
        VideoError: the source is missing, empty, a directory, not a video, has no picture or too large ones; or the back-end
            is unknown, not installed, or cannot read this source right.
    """
    if backend not in BACKENDS:
        raise VideoError(f"unknown back-end {backend!r}; there are {', '.join(BACKENDS)}")
    if timeout <= 0:
        raise VideoError(f"timeout is a number above 0, got {timeout!r}")
    if isinstance(source, str) and source.startswith("synthetic://"):
        from .synthetic import from_address

        return from_address(source)
    from . import pyav

    opened = pyav.PyAVReader(resolve(source, format, options), timeout, given(limits))
    try:
        return _with_backend(opened, backend)
    except BaseException:
        opened.close()
        raise


def _with_backend(reader: Any, backend: str) -> VideoReader:
    from .decord import DecordPicker, unfit
    from .torchcodec import TorchcodecPicker

    if backend == "pyav":
        reader.why = "PyAV was asked for"
    elif backend == "auto":
        try:
            reason = unfit(reader)
            if not reason:
                reader.use(DecordPicker(reader), "decord, for random access in mp4 and mkv files")
        except VideoError as error:
            reason = str(error)
        reader.why = f"PyAV, because {reason}" if reason else reader.why
    else:
        picker = {"decord": DecordPicker, "torchcodec": TorchcodecPicker}[backend]
        reader.use(picker(reader), f"{backend} was asked for")
    return reader
