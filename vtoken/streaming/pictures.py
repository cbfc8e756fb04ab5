"""Frames as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..images import pixels


def picture_of(frame: Any) -> tuple[np.ndarray, float | None]:
    """(h, w, 3) uint8 RGB of a frame in C order, upright, and its time if it knows it.

    Raises:
        TypeError: for what is no picture.
        ValueError: for a PIL image that is damaged, too large or of unknown colours.
    """
    return pixels(getattr(frame, "image", frame)), getattr(frame, "seconds", None)


def resized_to(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture at (height, width), bilinear where it has another size."""
    if image.shape[:2] == size:
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
