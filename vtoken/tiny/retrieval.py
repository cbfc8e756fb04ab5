"""Retrieval between texts and videos with a CLIP: embeddings of videos, recall at 1, 5 and 10."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .. import videos
from .clips import Clip


@torch.no_grad()
def video_embeddings(
    model: Any, preprocess: Callable[[Any], torch.Tensor], clips: Sequence[Clip], batch_size: int = 8
) -> torch.Tensor:
    """L2-normalised embeddings ``(n, D)`` of clips of one length.

    Each is the mean of the L2-normalised embeddings of its frames (CLIP4Clip, arXiv:2104.08860). The
    frames of a clip are consecutive in the batch that ``model.encode_image`` gets.
    """
    lengths = {len(clip.media) for clip in clips}
    if len(lengths) != 1:
        raise ValueError(f"video_embeddings needs clips of one length, got {sorted(lengths)} frames")
    device, rows = next(model.parameters()).device, []
    for first in range(0, len(clips), batch_size):
        some = clips[first : first + batch_size]
        pixels = torch.stack([preprocess(frame) for clip in some for frame in clip.media])
        rows.append(videos.video_embeddings(model.encode_image(pixels.to(device)).float(), *lengths))
    return torch.cat(rows)


@torch.no_grad()
def text_embeddings(
    model: Any, tokenizer: Callable[[list[str]], torch.Tensor], texts: Sequence[str]
) -> torch.Tensor:
    """L2-normalised embeddings ``(n, D)`` of texts."""
    device = next(model.parameters()).device
    return F.normalize(model.encode_text(tokenizer(list(texts)).to(device)).float(), dim=-1)


def recalls(similarity: torch.Tensor) -> dict[str, float]:
    """Recall in percent of the pairs on the diagonal of ``(texts, videos)``, both ways, and their sum.

    Returns:
        ``t2v_r1``, ``t2v_r5``, ``t2v_r10``, ``v2t_r1``, ``v2t_r5``, ``v2t_r10`` and ``rsum`` (of the six,
        0 to 600, as in TempMe, arXiv:2409.01156). Of equal similarities the right one counts as the last.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"recalls needs a square similarity, got {tuple(similarity.shape)}")
    out = {}
    for way, table in (("t2v", similarity), ("v2t", similarity.T)):
        ahead = (table >= table.diagonal()[:, None]).sum(1) - 1
        for k in (1, 5, 10):
            out[f"{way}_r{k}"] = 100 * (ahead < k).float().mean().item()
    return {**out, "rsum": sum(out.values())}
