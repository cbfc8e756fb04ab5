"""The video processors of the Qwen-VL families with their floats made last: equal bit for bit, and faster."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .processor_sampling import video_part

# classes of transformers that only move values after they normalise; their patches hold 3 colours in turn
_FAMILIES = ("Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor")


def fast_processor(processor: Any) -> Any:
    """A copy of a processor that gives the same tensors for videos in about half the time.

    The video processor's own steps (resizing, cutting into patches, joining) run on uint8 instead of float32,
    and its own function normalises the patches at the end. That changes no bit, because those steps only move
    values once the frames are resized.

    Args:
        processor: processor of Qwen2-VL, 2.5-VL or 3-VL, or its video processor. Others are returned as they
            are (LLaVA-OneVision's and InternVL's gain nothing); videos of floats, and those that are not
            normalised, take the usual path.

    Raises:
        VideoError: it has no video processor.
    """
    part = video_part(processor)
    if type(part).__name__ not in _FAMILIES:
        return processor
    fast = copy.copy(part)
    fast.__class__ = _fast_class(type(part))  # type: ignore[arg-type]
    if part is processor:
        return fast
    whole = copy.copy(processor)
    whole.video_processor = fast
    return whole


@cache
def _fast_class(own: type[Any]) -> type[Any]:
    """A subclass that is written to files, and named, as `own`."""

    def preprocess(self: Any, videos: list[Tensor], **kwargs: Any) -> Any:
        return _preprocess(self, own._preprocess, videos, **kwargs)

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (own,), {**names, "_preprocess": preprocess})


def _preprocess(part: Any, own: Any, videos: list[Tensor], **kwargs: Any) -> Any:
    floats = any(v.dtype != torch.uint8 or v.shape[-3] != 3 for v in videos)
    if floats or not (kwargs["do_rescale"] and kwargs["do_normalize"]):
        return own(part, videos=videos, **kwargs)
    moving, asked = copy.copy(part), []

    def later(images: Tensor, *args: Any) -> Tensor:
        asked.append(args)
        return images

    moving.rescale_and_normalize = later
    kind = kwargs.pop("return_tensors", None)
    out = own(moving, videos=videos, **kwargs)
    patches = out["pixel_values_videos"]
    colours = patches.reshape(len(patches), 3, -1, 1)
    out["pixel_values_videos"] = part.rescale_and_normalize(colours, *asked[0]).reshape(patches.shape)
    return out if kind is None else out.convert_to_tensors(kind)
