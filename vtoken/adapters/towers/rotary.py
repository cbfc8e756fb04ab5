"""Rotary embedding of queries and keys as the vision towers apply it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def rotate(tensors: Iterable[Tensor], rotary: tuple[Tensor, Tensor], dim: int) -> list[Tensor]:
    """Queries and keys (..., head_dim) after rotary embedding, computed in float32 at least, in their own dtype.

    Args:
        tensors: what to rotate, the first half of the last dimension against the second.
        rotary: cos and sin, (tokens, head_dim).
        dim: where `rotary` misses the heads' dimension.
    """
    out = []
    for x in tensors:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        cos, sin = (r.to(wide.dtype).unsqueeze(dim) for r in rotary)
        a, b = wide.chunk(2, -1)
        out.append((wide * cos + torch.cat([-b, a], -1) * sin).to(x.dtype))
    return out
