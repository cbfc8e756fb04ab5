"""Opens, demuxes and decodes with PyAV; damaged packets and frames are counted and skipped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..limits import Limits
from .allowed import restrictions
from .errors import Unreadable, VideoError, brief, load
from .growing_files import Stopped, Waiting
from .source import Source

_ALIGNED = 2**21  # pixels by which a decoder's rows may be longer than the picture
_GARBAGE = 64  # errors of the demuxer in a row after which a source is taken to have ended


@dataclass
class Damage:
    """Counts of skipped data: packets refused by demuxer or decoder, frames marked as corrupt."""

    packets: int = 0
    frames: int = 0

    def __bool__(self) -> bool:
        return bool(self.packets or self.frames)


def open_container(
    source: Source, limits: Limits, *, timeout: float, live: bool = False, stop: threading.Event | None = None
) -> tuple[Any, Any]:
    """The opened container and its video stream; files that the source names stay closed, see `allowed`.

    Args:
        limits: bounds on the size of its pictures.
        timeout: seconds that the network or a pipe may stay silent.
        live: hold no frames back.
        stop: set to end waiting for a pipe, which then raises `Stopped`.

    Raises:
        VideoError: the source cannot be opened, has no picture, or one that is too large; `Unreadable` where
            no second try will help.
    """
    av = load("av", "PyAV")
    options = restrictions(source)
    if live:
        options.setdefault("fpsprobesize", "2")  # or libav waits for twenty frames to guess the rate from
    if limits.pixels is not None:
        # of the decoders that look for the size of the pictures
        options["max_pixels"] = str(limits.pixels + _ALIGNED)
    if source.kind == "network" and source.target.startswith("rtsp"):
        options.setdefault("rtsp_transport", "tcp")  # frames that UDP loses come out damaged
    container = None
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
        return container, _video_stream(av, container, source, live, limits)
    except BaseException as error:
        if container is not None:
            container.close()
        if isinstance(error, VideoError | Stopped) or not isinstance(error, Exception):
            raise
        raise _refusal(av, error, source, timeout) from error


def _video_stream(av: Any, container: Any, source: Source, live: bool, limits: Limits) -> Any:
    covers = [s for s in container.streams.video if s.disposition & av.stream.Disposition.attached_pic]
    streams = [s for s in container.streams.video if s not in covers]
    if not streams:
        kinds = sorted({s.type or "unknown" for s in container.streams if s not in covers})
        raise VideoError(f"{source.name!r} has no video stream, only {' and '.join(kinds) or 'nothing'}")
    # of several renditions of one stream, the largest that is not too large; the first of those
    readable = [s for s in streams if s.codec_context is not None]
    if not readable:
        raise Unreadable(f"{source.name!r} holds video that this build of PyAV cannot decode")
    fitting = [s for s in readable if not limits.excess_pixels(s.width, s.height)]
    if not fitting:
        excess = limits.excess_pixels(readable[0].width, readable[0].height)
        raise Unreadable(f"{source.name!r} {excess}")
    stream = max(fitting, key=lambda s: s.width * s.height)
    if limits.pixels is not None:
        stream.codec_context.options = {"max_pixels": str(limits.pixels + _ALIGNED)}
    # threads over frames hold back as many frames as there are threads
    stream.thread_type = "SLICE" if live else "AUTO"
    return stream


def _target(source: Source, timeout: float, stop: threading.Event | None) -> Any:
    return Waiting(source.target, timeout, stop) if source.kind == "pipe" else source.target


def _refusal(av: Any, error: Exception, source: Source, timeout: float) -> VideoError:
    name = repr(source.name)
    unknown = isinstance(error, (av.error.ProtocolNotFoundError, av.error.DemuxerNotFoundError))
    if unknown or "no container format" in str(error):
        return Unreadable(
            f"cannot open {name}: this build of PyAV knows no such protocol or format ({brief(error)})"
        )
    if isinstance(error, av.error.ExitError):
        return VideoError(f"cannot open {name}: no answer within {timeout:g} s")
    if isinstance(error, av.error.ArgumentError) and source.kind != "network" and source.format is None:
        return Unreadable(
            f"{name} is not a video that is read by itself: it is damaged, text, or a playlist, which names"
            " other files (if you trust it, name its format, such as format='hls')"
        )
    if isinstance(error, av.error.InvalidDataError):
        return VideoError(
            f"{name} is not a video that libav can read, or its index is cut off ({brief(error)})"
        )
    return VideoError(f"cannot open {name}: {brief(error)}")


def decoded(
    packets: Iterable[Any], damage: Damage, limits: Limits, decode: Callable[[Any], list[Any]] | None = None
) -> Iterator[Any]:
    """Frames of PyAV in the decoder's order; undecodable or too large ones are counted and skipped.

    Args:
        decode: frames of one packet; None for all that it completes.
    """
    av = load("av", "PyAV")
    for packet in packets:
        try:
            frames = packet.decode() if decode is None else decode(packet)
        except av.error.EOFError:
            return
        except Exception:  # libav's own errors, and PyAV's for unexpected values
            damage.packets += 1
            continue
        for frame in frames:
            if frame.is_corrupt or limits.excess_pixels(frame.width, frame.height):
                damage.frames += 1
            else:
                yield frame


def packets(container: Any, stream: Any, damage: Damage, *, live: bool = False) -> Iterator[Any]:
    """Packets of one stream from the container's current place; the empty one that flushes comes last.

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
        except (VideoError, Stopped):
            raise
        except Exception as error:
            if live:
                raise VideoError(brief(error)) from error
            damage.packets += 1
            return


def seek(container: Any, stream: Any, pts: int) -> bool:
    """Move to the key frame at or before a pts; False where libav cannot."""
    try:
        container.seek(pts, stream=stream)
    except Exception:  # OverflowError too, for a time outside every file
        return False
    return True


def orientation(frame: Any) -> tuple[bool, int, int]:
    """Orientation of a frame in quarter turns: (transpose, step of rows, step of columns)."""
    try:
        side = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # other data on the frame are of a type that PyAV does not know, such as EXIF
        turn = round(frame.rotation / 90) % 4
        return turn % 2 == 1, -1 if turn in (1, 2) else 1, -1 if turn in (2, 3) else 1
    if side is None:
        return False, 1, 1
    a, b, _, c, d = (int(x) for x in np.frombuffer(bytes(side), np.int32)[:5])
    transpose = abs(a) + abs(d) < abs(b) + abs(c)
    rows, columns = (b, c) if transpose else (d, a)
    return transpose, -1 if rows < 0 else 1, -1 if columns < 0 else 1


def to_rgb(frame: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """(height, width, 3) uint8 RGB of a PyAV frame, upright.

    Args:
        size: (height, width) to scale to (bicubic, low-pass filtered where it shrinks), None for its own.

    Raises:
        VideoError: its pixels cannot be converted.
    """
    try:
        transpose, rows, columns = orientation(frame)
        if size is None:
            image = frame.to_ndarray(format="rgb24")
        else:
            height, width = size[::-1] if transpose else size
            image = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    except Exception as error:
        raise VideoError(
            f"a picture of {frame.width} x {frame.height} cannot be converted: {brief(error)}"
        ) from error
    if transpose:
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(image[::rows, ::columns])
