"""Frames as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def picture_of(frame: Any) -> tuple[np.ndarray, float | None]:
    """(h, w, 3) uint8 RGB of a frame, and its time if it knows it. Raises TypeError for what is no picture."""
    image, seconds = getattr(frame, "image", frame), getattr(frame, "seconds", None)
    if hasattr(image, "convert"):
        image = image.convert("RGB")
    array = np.asarray(image.cpu() if isinstance(image, torch.Tensor) else image)
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise TypeError(
            f"A frame is an (h, w, 3) uint8 RGB array or a PIL image, found {type(frame).__name__} of shape {array.shape} and "
            f"{array.dtype}."
        )
    return array, seconds


def resized_to(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture at (height, width), bilinear where it has another size."""
    if image.shape[:2] == size:
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
