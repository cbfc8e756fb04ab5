"""Opening, demuxing and decoding with PyAV, past whatever damage a source has."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import Unreadable, VideoError, brief, load
from .source import Source
from .waiting import Stopped, Waiting

_GARBAGE = 64  # errors of the demuxer in a row after which a source is taken to have ended
_PIXELS = 2**26  # of a picture of a live source; an 8K frame has half as many


@dataclass
class Damage:
    """What was left out: packets that the demuxer or decoder refused, frames that the decoder marked as corrupt."""

    packets: int = 0
    frames: int = 0

    def __bool__(self) -> bool:
        return bool(self.packets or self.frames)


def open_container(
    source: Source, *, timeout: float, live: bool = False, stop: threading.Event | None = None
) -> tuple[Any, Any]:
    """The opened container and its video stream.

    Args:
        timeout: seconds that the network or a pipe may stay silent.
        live: hold no frames back and refuse pictures of more than 2**26 pixels.
        stop: set to end waiting for a pipe, which then raises `Stopped`.

    Raises:
        VideoError: the source cannot be opened or has no picture; `Unreadable` where it never will.
    """
    av = load("av", "PyAV")
    options = dict(source.options)
    if live:
        options.setdefault("fpsprobesize", "2")  # or libav waits for twenty frames to guess the rate from
    if source.kind == "network" and source.target.lower().startswith("rtsp"):
        options.setdefault("rtsp_transport", "tcp")  # frames that UDP loses come out damaged
    try:
        if source.kind == "object" and not source.live:
            source.target.seek(0)
        container = av.open(
            _target(source, timeout, stop),
            format=source.format,
            options=options,
            timeout=(timeout, timeout) if source.kind == "network" else None,
            metadata_errors="replace",
        )
    except (VideoError, Stopped):
        raise
    except Exception as error:
        raise _refusal(av, error, source, timeout) from error
    try:
        return container, _video_stream(av, container, source, live)
    except BaseException:
        container.close()
        raise


def _video_stream(av: Any, container: Any, source: Source, live: bool) -> Any:
    if container.format.name == "tty":
        raise Unreadable(f"{source.name!r} is a text file, not a video")
    covers = [s for s in container.streams.video if s.disposition & av.stream.Disposition.attached_pic]
    streams = [s for s in container.streams.video if s not in covers]
    if not streams:
        kinds = sorted({s.type or "unknown" for s in container.streams if s not in covers})
        raise VideoError(f"{source.name!r} has no video stream, only {' and '.join(kinds) or 'nothing'}")
    # of several renditions of one stream, the largest; the first of those
    stream = max(streams, key=lambda s: (s.codec_context is not None, s.width * s.height))
    if stream.codec_context is None:
        raise Unreadable(f"{source.name!r} holds video that this build of PyAV cannot decode")
    if live:
        stream.codec_context.options = {"max_pixels": str(_PIXELS)}
    # threads over frames hold back as many frames as there are threads
    stream.thread_type = "SLICE" if live else "AUTO"
    return stream


def _target(source: Source, timeout: float, stop: threading.Event | None) -> Any:
    return Waiting(source.target, timeout, stop) if source.kind == "pipe" else source.target


def _refusal(av: Any, error: Exception, source: Source, timeout: float) -> VideoError:
    name = repr(source.name)
    unknown = isinstance(error, (av.error.ProtocolNotFoundError, av.error.DemuxerNotFoundError))
    if unknown or "no container format" in str(error):
        return Unreadable(f"cannot open {name}: this build of PyAV knows no such protocol or format ({brief(error)})")
    if isinstance(error, av.error.ExitError):
        return VideoError(f"cannot open {name}: no answer within {timeout:g} s")
    if isinstance(error, av.error.InvalidDataError):
        return VideoError(f"{name} is not a video that libav can read, or its index is cut off ({brief(error)})")
    return VideoError(f"cannot open {name}: {brief(error)}")


def decoded(packets: Iterable[Any], damage: Damage) -> Iterator[Any]:
    """Frames of PyAV in the order the decoder gives them; what cannot be decoded is counted in `damage` and left out."""
    av = load("av", "PyAV")
    for packet in packets:
        try:
            frames = packet.decode()
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            damage.packets += 1
            continue
        for frame in frames:
            if frame.is_corrupt:
                damage.frames += 1
            else:
                yield frame


def packets(container: Any, stream: Any, damage: Damage, *, live: bool = False) -> Iterator[Any]:
    """Packets of one stream from where its container stands, the empty one that flushes the decoder last.

    Raises:
        VideoError: a live source broke off or went silent. Of a file, what came before is all there is.
    """
    av = load("av", "PyAV")
    failures = 0
    while True:
        try:
            for packet in container.demux(stream):
                failures = 0
                yield packet
            return
        except av.error.InvalidDataError as error:
            failures += 1
            damage.packets += 1
            if failures == _GARBAGE:
                if live:
                    raise VideoError(f"nothing but damaged data arrives ({brief(error)})") from error
                return
        except av.error.ExitError as error:
            raise VideoError("no data within the time-out") from error
        except (av.error.FFmpegError, OSError) as error:
            if live:
                raise VideoError(brief(error)) from error
            damage.packets += 1
            return


def seek(container: Any, stream: Any, pts: int) -> bool:
    """Move to the key frame at or before a pts; False where libav cannot."""
    av = load("av", "PyAV")
    try:
        container.seek(pts, stream=stream)
    except (av.error.FFmpegError, OSError):
        return False
    return True


def orientation(frame: Any) -> tuple[bool, int, int]:
    """How a frame's display matrix turns it, to the nearest quarter turn: (transpose, step of rows, step of columns)."""
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return False, 1, 1
    a, b, _, c, d = (int(x) for x in np.frombuffer(bytes(side), np.int32)[:5])
    transpose = abs(a) + abs(d) < abs(b) + abs(c)
    rows, columns = (b, c) if transpose else (d, a)
    return transpose, -1 if rows < 0 else 1, -1 if columns < 0 else 1


def to_rgb(frame: Any) -> np.ndarray:
    """(height, width, 3) uint8 RGB of a PyAV frame, upright."""
    image = frame.to_ndarray(format="rgb24")
    transpose, rows, columns = orientation(frame)
    if transpose:
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(image[::rows, ::columns])
