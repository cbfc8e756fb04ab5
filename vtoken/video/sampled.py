"""`sample`: from a file to the frames that a model's processor takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..limits import STANDARD, Limits
from .errors import VideoError, checked
from .frame import Frame
from .processor_sampling import ask, video_part
from .pyav import PyAVReader
from .reader import open_video
from .sampling import check_rate, instants, uniform_indices


@dataclass(frozen=True, eq=False)
class SampledVideo:
    """Frames of one video, ready for a processor of transformers.

    Attributes:
        frames: (t, 3, h, w) uint8 RGB. Its memory is laid out as (t, h, w, 3), so that
            ``frames.permute(0, 2, 3, 1)`` is contiguous; processors take both, this one without a copy.
        seconds: (t,) presentation times.
        indices: (t,) places in presentation order.
        metadata: `VideoMetadata` of transformers, of the whole video and of these frames.
        backend: back-end that decoded them.
        why: one sentence: why this back-end.
    """

    frames: Tensor
    seconds: tuple[float, ...]
    indices: tuple[int, ...]
    metadata: Any
    backend: str
    why: str

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments for a processor, ``processor(text=text, **inputs)``, which then samples no more."""
        return {"videos": [self.frames], "video_metadata": [self.metadata], "do_sample_frames": False}


@checked
def sample(
    source: Any,
    frames: int | None = None,
    fps: float | None = None,
    *,
    processor: Any = None,
    backend: str = "auto",
    size: tuple[int, int] | None = None,
    scaled: bool = False,
    limits: Limits | None = STANDARD,
) -> SampledVideo:
    """Decode the frames that a model is to see, and no others.

    With a processor, the frames are those that `processor(videos=source, num_frames=frames)` (or `fps=fps`)
    takes: it is asked for the indices on the file's metadata. It may round the number or the rate, or keep to
    its own. Where neither is given, its configuration decides, and may take all frames. Without a processor,
    they are spread evenly (first and last included), or are those on screen every 1/fps seconds.

    By default the frames have the size of the video, and the processor's results are those of plain
    transformers, but for turned video, which comes upright here. `scaled` and `size` make libav resize while
    it decodes, which is faster, takes less memory, and changes pixels: docs/video.md says by how much.

    Args:
        source: anything with an end that `open_video` opens.
        frames: number of frames.
        fps: frames per second.
        processor: processor of transformers, or its video processor.
        backend: see `open_video`.
        size: (height, width) to which every frame is scaled while it is decoded.
        scaled: scale to the size to which the processor resizes. It leaves the frames as they are then. Where
            the processor tells no such size, the frames keep that of the video.
        limits: bounds on the cost, None for none.

    Raises:
        VideoError: frames and fps together, or neither without a processor; the processor refuses the number
            or the video; the source cannot be opened, counted or decoded; a frame is damaged; its pictures
            differ in size.
    """
    _check(frames, fps, processor, size, scaled)
    scaling = scaled or size is not None
    with open_video(source, "pyav" if scaling and backend == "auto" else backend, limits=limits) as reader:
        metadata = _metadata(reader)
        if processor is None:
            indices = _without_processor(reader, frames, fps)
        else:
            asked = ask(processor, metadata, frames, fps, size=scaled)
            indices = asked.indices
            size = asked.size if scaled else size
            if scaled and not _stays(processor, metadata, asked.size, frames, fps):
                size = None
        if not indices:
            raise VideoError("the processor takes no frame of this video")
        shown = _stacked(_each(reader, indices, size), indices)
        metadata.frames_indices = list(indices)
        metadata.video_backend = reader.backend
        return SampledVideo(*shown, indices, metadata, reader.backend, reader.why)


def _check(
    frames: int | None, fps: float | None, processor: Any, size: tuple[int, int] | None, scaled: bool
) -> None:
    if frames is not None and fps is not None:
        raise VideoError(f"sample takes frames or fps, got frames={frames} and fps={fps:g}")
    if processor is None and (scaled or (frames is None and fps is None)):
        raise VideoError("sample needs frames= or fps=, and processor= for scaled=True")
    if scaled and size is not None:
        raise VideoError("sample takes size= or scaled=True, not both")
    if frames is not None and frames < 1:
        raise VideoError(f"sample takes at least 1 frame, got frames={frames}")
    if fps is not None:
        check_rate(fps)
    if processor is not None:
        video_part(processor)


def _metadata(reader: Any) -> Any:
    """`VideoMetadata` of a whole file: frames and rate as readers of transformers give them."""
    from transformers.video_utils import VideoMetadata

    try:
        total = len(reader)
    except TypeError as error:
        raise VideoError(f"sample takes videos with an end ({error})") from None
    height, width = (
        reader.upright_size if isinstance(reader, PyAVReader) else next(iter(reader)).image.shape[:2]
    )
    return VideoMetadata(
        total_num_frames=total, fps=reader.fps, width=width, height=height, duration=total / reader.fps
    )


def _without_processor(reader: Any, frames: int | None, fps: float | None) -> tuple[int, ...]:
    if frames is not None:
        return tuple(uniform_indices(len(reader), frames))
    assert fps is not None
    times = instants(reader, fps, 0.0, reader.duration)
    times = times if len(times) else np.zeros(1)
    if isinstance(reader, PyAVReader):
        return tuple(reader.table.on_screen(times).tolist())
    return tuple(np.floor(times * reader.fps + 1e-6).astype(int).tolist())


def _stays(processor: Any, metadata: Any, size: Any, frames: int | None, fps: float | None) -> bool:
    """Whether a processor leaves frames of this size as they are."""
    if size is None:
        return False
    small = replace(metadata, height=size[0], width=size[1])
    return ask(processor, small, frames, fps, size=True).size == size


def _each(reader: Any, indices: tuple[int, ...], size: tuple[int, int] | None) -> Iterable[Frame]:
    """The frames at `indices`, ascending, each once."""
    if isinstance(reader, PyAVReader):
        return reader.each(indices, size)
    if size is not None:
        raise VideoError(f"a {reader.backend} video is not scaled")
    return reader.get_frames(sorted(set(indices)))


def _stacked(each: Iterable[Frame], indices: tuple[int, ...]) -> tuple[Tensor, tuple[float, ...]]:
    """Frames and seconds in the order of `indices`; no more than one frame is held twice."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    out: np.ndarray | None = None
    seconds = [0.0] * len(indices)
    for frame in each:
        image = frame.image
        if out is None:
            out = np.empty((len(indices), *image.shape), np.uint8)
        if image.shape != out.shape[1:]:
            raise VideoError(
                f"frame {frame.index} has {image.shape[1]} x {image.shape[0]} pixels and the ones before it"
                f" {out.shape[2]} x {out.shape[1]}; size= makes them equal"
            )
        for place in places[frame.index]:
            out[place], seconds[place] = image, frame.seconds
    assert out is not None
    return torch.from_numpy(out).permute(0, 3, 1, 2), tuple(seconds)
