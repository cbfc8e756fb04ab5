"""Attention of a few queries per frame over the keys of their own windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    windows: Sequence[int],
    heads: int,
    scale: float,
) -> tuple[Tensor, int]:
    """Softmax attention, (frames, m, C) in the dtype of `value`, and the number of computed query-key pairs.

    Args:
        query: (frames, m, C), heads side by side; rotary embedding, if any, applied as to `key`.
        key, value: (frames, n, C).
        chosen: (frames, m) int64, ascending: the token of every query.
        windows: lengths that add up to n; a token sees its own window. With several, queries are padded to
            the fullest window, which costs at most as much as all n queries.
        scale: factor on the logits.
    """
    frames, m, width = query.shape
    if len(windows) == 1:
        return _sdpa(query, key, value, heads, scale), frames * m * key.shape[1]
    lengths = torch.tensor(windows, device=query.device)
    window = torch.repeat_interleave(torch.arange(len(windows), device=query.device), lengths)[chosen]
    counts = F.one_hot(window, len(windows)).sum(1)  # (frames, windows)
    most, longest = int(counts.max()), max(windows)
    place = torch.arange(m, device=query.device) - (counts.cumsum(1) - counts).gather(1, window)
    slot = (window * most + place)[..., None].expand_as(query)  # of every query among the padded ones
    padded = query.new_zeros(frames, len(windows) * most, width).scatter(1, slot, query)
    column = torch.arange(longest, device=query.device)
    seen = column < lengths[:, None]  # (windows, longest)
    rows = ((lengths.cumsum(0) - lengths)[:, None] + column).clamp(max=key.shape[1] - 1).flatten()
    mask = None if bool(seen.all()) else seen.repeat(frames, 1)[:, None, None]
    mixed = _sdpa(
        padded.view(-1, most, width),
        key[:, rows].reshape(-1, longest, width),
        value[:, rows].reshape(-1, longest, width),
        heads,
        scale,
        mask,
    )
    return mixed.reshape(frames, -1, width).gather(1, slot), frames * len(windows) * most * longest


def _sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q.to(v), k.to(v), v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).flatten(2)
