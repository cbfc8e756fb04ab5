"""Frames as arrays, times as numbers."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch

MAX_PIXELS = 2**27
MAX_RATIO = 200  # of the sides, that of Qwen's processors


def picture_of(frame: Any) -> tuple[np.ndarray, Any]:
    """A copy of a frame as (h, w, 3) uint8 RGB, and its time if it knows it.

    Raises:
        TypeError: for what is no picture.
        ValueError: for one without pixels, with more than `MAX_PIXELS`, or narrower than a 200th of its length.
    """
    image, seconds = getattr(frame, "image", frame), getattr(frame, "seconds", None)
    shape, kind = getattr(image, "shape", None), getattr(image, "dtype", None)
    if hasattr(image, "convert"):
        shape, kind = (*image.size[::-1], 3), "uint8"
    if not isinstance(shape, tuple) or len(shape) != 3 or shape[-1] != 3 or str(kind) not in ("uint8", "torch.uint8"):
        found = f" of shape {tuple(shape)} and {kind}" if isinstance(shape, tuple) else ""
        raise TypeError(
            f"A frame is an (h, w, 3) uint8 RGB array or a PIL image, found {type(frame).__name__}{found}."
        )
    high, wide = (int(side) for side in shape[:2])
    if not high or not wide or high * wide > MAX_PIXELS or max(high, wide) > MAX_RATIO * min(high, wide):
        raise ValueError(
            f"A frame has 1 to {MAX_PIXELS} pixels and sides that differ by a factor of {MAX_RATIO} at most, found {wide} x "
            f"{high}."
        )
    if hasattr(image, "convert"):
        image = image.convert("RGB")
    if isinstance(image, torch.Tensor):
        image = image.cpu().numpy()
    return np.array(image, order="C"), seconds


def time_of(t: Any) -> float:
    """A time in seconds. Raises TypeError for what is no number, ValueError for nan and infinity."""
    if isinstance(t, bool | np.bool_) or not isinstance(t, numbers.Real | np.number | torch.Tensor | np.ndarray):
        raise TypeError(f"A time is a number of seconds, found {type(t).__name__}.")
    try:
        seconds = float(t)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"A time is one number of seconds, found {t!r}.") from None
    if not math.isfinite(seconds):
        raise ValueError(f"A time is a finite number of seconds, found {seconds}.")
    return seconds


def resized_to(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture at (height, width), bilinear where it has another size."""
    if image.shape[:2] == size:
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
