"""Random access through decord, restricted to the files that it reads right.

It returns wrong frames without an error for MPEG-TS, AVI, FLV and fragmented mp4, for MPEG-4 with B-frames,
for HEVC, and for H.264 with open groups of pictures or gradual refresh; and four channels for a rotated
video. In long files decord2 3.4 shows other frames than those asked for, because it waits for its decoder a
fixed number of times. So it provides pixels only, and only of files that it reads right; the frame numbers
come from PyAV.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .allowed import by_itself
from .errors import VideoError, brief, load
from .picker import check_count
from .pyav import PyAVReader

_STRICT = 1e-9  # share of a video's frames that decord may replace by others before it raises
_STATED = 2**22  # frames that a file may state to have
_LONGEST = 2**12  # frames of a file; in longer ones decord gives up on the way to a frame, and shows another
_WORK = 2**36  # pixels that may have to be decoded for one frame: decord cannot be interrupted


def unfit(reader: PyAVReader) -> str | None:
    """Reason not to read a source with decord, None if decord reads it right."""
    track = reader.track
    if reader.source.kind != "file":
        return "decord reads files only"
    if not {"mp4", "matroska"} & track.format:
        return f"decord is not exact in {'/'.join(sorted(track.format))} files"
    if not by_itself(reader.source.path):
        return "decord opens what a playlist names, and only files that begin as mp4 or mkv surely are none"
    if track.fragmented:
        return "decord is not exact in fragmented mp4 files"
    if track.turned:
        return "decord does not read rotated video right"
    if len(reader.table) > _LONGEST:
        return f"decord has been seen to give other frames in files of more than {_LONGEST:,} frames"
    if not reader.regularity.closed:
        return "decord is exact only where each key frame is known to start a closed group of pictures"
    if not one_size(reader):
        return (
            "decord takes no bound on pixels, and pictures of this file may grow (limits=Limits(pixels=None)"
            " allows that)"
        )
    if (track.stated_duration or 0) * track.fps > _STATED:
        return "decord reserves memory for as many frames as a file's duration states"
    if reader.table.longest_group * track.size[0] * track.size[1] > _WORK:
        return "decord cannot be interrupted, and key frames are far apart here"
    return None


def one_size(reader: PyAVReader) -> bool:
    """Whether no picture exceeds the bound on pixels, for a package that takes none.

    PyAV has decoded the first picture within it, and the others have its size.
    """
    return reader.limits.pixels is None or (reader.track.turned is not None and reader.regularity.steady)


class DecordPicker:
    """decord or decord2 on one file; both are the module `decord`."""

    name = "decord"

    def __init__(self, reader: PyAVReader):
        decord = load("decord", "decord")
        reason = unfit(reader)
        if reason:
            raise VideoError(f"{reason}: {reader.source.name!r} needs backend 'pyav'")
        try:
            self._reader = decord.VideoReader(reader.source.path, ctx=decord.cpu(0), fault_tol=_STRICT)
        except Exception as error:
            raise VideoError(f"decord cannot open {reader.source.name!r}: {brief(error)}") from error
        check_count(self.name, len(self._reader), len(reader.table), reader.source.name)

    def images(self, ordinals: Sequence[int]) -> list[np.ndarray]:
        """See `Picker`."""
        try:
            return list(self._reader.get_batch(list(ordinals)).asnumpy()) if ordinals else []
        except Exception as error:
            raise VideoError(brief(error)) from error

    def close(self) -> None:
        self._reader = None
