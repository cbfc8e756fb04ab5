"""Embeddings of videos from those of their frames."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def video_embeddings(frame_embeddings: Tensor, frames: int, mask: Tensor | None = None) -> Tensor:
    """The mean of the L2-normalised embeddings of a video's frames, normalised (arXiv 2409.01156).

    Args:
        frame_embeddings: (videos * frames, D), the frames of one video after the other.
        frames: frames of a video.
        mask: (videos, frames), 1 or True for the frames that count; all if None.

    Returns:
        (videos, D) in the dtype of the frames.

    Raises:
        ValueError: for embeddings that are no whole number of videos, or a mask of another shape.
    """
    if frames < 1 or frame_embeddings.ndim != 2 or len(frame_embeddings) % frames:
        raise ValueError(
            f"video_embeddings takes (videos * {frames}, D), found {tuple(frame_embeddings.shape)}: give all"
            " frames of every video."
        )
    each = F.normalize(frame_embeddings, dim=-1).unflatten(0, (-1, frames))
    if mask is None:
        return F.normalize(each.mean(1), dim=-1)
    if mask.shape != each.shape[:2]:
        raise ValueError(f"mask has one entry per frame, {tuple(each.shape[:2])}, found {tuple(mask.shape)}.")
    weight = mask.to(each)[..., None]
    return F.normalize((each * weight).sum(1) / weight.sum(1).clamp(min=1), dim=-1)
