"""`open_video`: one protocol over PyAV, decord and torchcodec."""

from __future__ import annotations

from typing import Any

from ..limits import STANDARD, Limits, given
from .errors import VideoError, checked
from .frame import VideoReader
from .source import resolve

BACKENDS = ("auto", "pyav", "decord", "torchcodec")


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
    """Open a video for reading.

    Nothing but the named source is opened: a playlist, which names other files, is refused unless its
    `format` is asked for, except under http, where it may name addresses. See docs/security.md.

    Args:
        source: path, address (http, rtsp, rtmp, srt, tcp, udp), binary file object, camera number, or
            "synthetic://SEED".
        backend: "auto" takes PyAV, which is measured as fast as the others and checks the time of every
            frame; "pyav", "decord" or "torchcodec" ask for one, the latter two for random access in files
            that they read right.
        format: demuxer of libav, None to probe; "lavfi" and "v4l2" name devices.
        options: options of libav for the source, such as {"rtsp_transport": "tcp"}.
        timeout: seconds that a stream of the network may stay silent.
        limits: bounds on pixels, frames, bytes and seconds, None for none. Whatever exceeds them raises
            VideoError, here or when it is read.

    Raises:
        VideoError: the source is missing, empty, a directory, not a video, has no picture or too large ones;
            or the back-end is unknown, not installed, or cannot read this source right.
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
    from .decord import DecordPicker
    from .torchcodec import TorchcodecPicker

    if backend in ("auto", "pyav"):
        reader.why = "PyAV was asked for" if backend == "pyav" else reader.why
    else:
        picker = {"decord": DecordPicker, "torchcodec": TorchcodecPicker}[backend]
        reader.use(picker(reader), f"{backend} was asked for")
    return reader
