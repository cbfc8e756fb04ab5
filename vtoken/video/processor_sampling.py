"""Which frames a processor of transformers takes of a video, and how large it makes them, without pixels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from .errors import VideoError, brief


@dataclass(frozen=True)
class Asked:
    """What a processor takes of one video.

    Attributes:
        indices: of the frames that it samples, in its order.
        size: (height, width) to which it resizes them; None where it resizes nothing, or cannot tell without
            pixels.
    """

    indices: tuple[int, ...]
    size: tuple[int, int] | None = None


class _Known(Exception):
    """Ends a processor's run once what was to be known is known."""


def video_part(processor: Any) -> Any:
    """The video processor of a processor, or the processor itself if it is one.

    Raises:
        VideoError: it has none.
    """
    part = getattr(processor, "video_processor", processor)
    if not (hasattr(part, "sample_frames") and hasattr(part, "fetch_videos")):
        raise VideoError(
            f"{type(processor).__name__} has no video processor of transformers, which says what to sample;"
            " leave processor= out and give its images the frames"
        )
    return part


def ask(processor: Any, metadata: Any, frames: int | None, fps: float | None, size: bool = False) -> Asked:
    """Run a video processor on a file of which only the metadata are known, up to where it needs pixels.

    The run is that of `processor(videos=path, num_frames=frames)`, or of `fps=fps`, sampling where either is
    given and as the processor's own configuration says where neither is.

    Args:
        metadata: `VideoMetadata` of transformers, without `frames_indices`.
        size: ask for the size, too.

    Raises:
        VideoError: the processor refuses such a video, or the number or rate.
    """
    part = copy.copy(video_part(processor))
    if frames is None and fps is None:
        return _run(part, metadata, {}, size)
    name, value, other = ("num_frames", frames, "fps") if fps is None else ("fps", fps, "num_frames")
    given = {name: value, "do_sample_frames": True}
    try:
        return _run(part, metadata, given, size)
    except VideoError:
        # where the two exclude each other, the one in the processor's configuration must go
        setattr(part, other, None)
        try:
            return _run(part, metadata, {**given, other: None}, size)
        except VideoError as error:
            total = metadata.total_num_frames
            most = total - total % 2 if total > 2 else total  # some round up to an even number
            if frames is None or frames <= most:
                raise
            raise VideoError(
                f"{type(part).__name__} cannot sample this video: it does not take frames={frames} of"
                f" {total}, ask for fewer, such as frames={most}"
            ) from error


def _run(part: Any, metadata: Any, given: dict[str, Any], size: bool) -> Asked:
    """Call a copy of a video processor whose method for files gives tensors without memory."""
    found: dict[str, Any] = {}

    def fetch_videos(videos: Any, sample_indices_fn: Any = None) -> Any:
        seen = copy.copy(metadata)
        taken = sample_indices_fn(metadata=seen) if sample_indices_fn else range(seen.total_num_frames)
        # float steps of some lengths and rates end one past the last frame, which no file has
        found["indices"] = tuple(i for i in map(int, taken) if i < seen.total_num_frames)
        if not size:
            raise _Known
        seen.frames_indices = list(found["indices"])
        shape = (len(found["indices"]), 3, metadata.height, metadata.width)
        return [(torch.empty(shape, dtype=torch.uint8, device="meta"),), (seen,)]

    def resize(*args: Any, **kwargs: Any) -> Any:
        found["size"] = tuple(type(part).resize(part, *args, **kwargs).shape[-2:])
        raise _Known

    part.fetch_videos, part.resize = fetch_videos, resize
    try:
        part(videos="a file", **given)
    except _Known:
        pass
    except Exception as error:
        if "indices" not in found:
            none = isinstance(error, ZeroDivisionError)  # Qwen2-VL rounds one frame down to none
            why = (
                "it comes down to no frame, try larger frames= or fps=, or neither" if none else brief(error)
            )
            raise VideoError(f"{type(part).__name__} cannot sample this video: {why}") from error
    return Asked(**found)
