"""Checks and conversions of a session's frames and times."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch

from ..images import PHOTO, pixels

MAX_PIXELS = PHOTO.pixels or 0
MAX_RATIO = 200  # largest ratio of the sides, as in Qwen's processors


def picture_of(frame: Any) -> tuple[np.ndarray, Any]:
    """A copy of a frame as (h, w, 3) uint8 RGB in C order, upright, and its time or None.

    Raises:
        TypeError: for an object that is not a picture.
        ValueError: for a picture with more than `MAX_PIXELS`, narrower than a 200th of its length, or 1 or 3
            pixels high; for a PIL image that is damaged or of unknown colours.
    """
    array = pixels(getattr(frame, "image", frame))
    high, wide = array.shape[:2]
    if high * wide > MAX_PIXELS or max(high, wide) > MAX_RATIO * min(high, wide):
        raise ValueError(
            f"A frame has 1 to {MAX_PIXELS} pixels and sides that differ by a factor of {MAX_RATIO} at most,"
            f" found {wide} x {high}."
        )
    if high in (1, 3):
        raise ValueError(
            f"A frame of {wide} x {high} pixels cannot be told from one whose channels come first: push"
            " frames of another height."
        )
    return np.array(array, order="C"), getattr(frame, "seconds", None)


def time_of(t: Any) -> float:
    """A time in seconds. Raises TypeError without a number, ValueError for nan and infinity."""
    if isinstance(t, bool | np.bool_) or not isinstance(
        t, numbers.Real | np.number | torch.Tensor | np.ndarray
    ):
        raise TypeError(f"A time is a number of seconds, found {type(t).__name__}.")
    try:
        seconds = float(t)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"A time is one number of seconds, found {t!r}.") from None
    if not math.isfinite(seconds):
        raise ValueError(f"A time is a finite number of seconds, found {seconds}.")
    return seconds


def resized_to(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture at (height, width), resized bilinearly if it has another size."""
    if image.shape[:2] == size:
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
