"""Plain torch twins of the Triton kernels, for CPUs, for autograd, and for machines without Triton.

They are called through `vtoken.kernels`, which documents and checks the arguments. All of them are
batched, compute in float32 (float64 for float64 input) and have no Python loop over tokens, heads or windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def full_precision(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Leave autocast, which would round the matrix products of scores to half precision."""

    @wraps(fn)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return fn(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return fn(x, *args, **kwargs)

    return call


def check_index(index: Tensor, low: int, high: int, name: str = "index") -> None:
    """Raise IndexError if an entry of a CPU index is outside of [low, high); a GPU would have to sync."""
    if index.device.type != "cpu" or torch.compiler.is_compiling() or not index.numel():
        return
    least, most = (int(v) for v in torch.aminmax(index))
    if least < low or most >= high:
        raise IndexError(
            f"{name} has entries from {least} to {most}; the rows it may name are {low} to {high - 1}."
        )


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, n, ...), index (B, m) -> (B, m, ...): a copy of the rows."""
    batch, n = x.shape[:2]
    check_index(index, 0, n)
    if not batch:
        return x.new_empty(*index.shape, *x.shape[2:])
    if batch == 1:
        return x[0].index_select(0, index[0])[None]
    if not x.is_contiguous():  # index_select is several times faster than indexing on a CPU
        return torch.stack([rows.index_select(0, at) for rows, at in zip(x, index, strict=True)])
    flat = index + torch.arange(batch, device=index.device)[:, None] * n
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)


def gather_rows(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    return [take(x, index) for x in tensors]


def gather_merge(
    x: Tensor, index: Tensor, into: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    kept, m = take(x, index), index.shape[1]
    if into is None or not kept.numel():
        return kept
    check_index(into, -1, m, "into")
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return _merge_with_grad(x, kept, into, weight)
    batch, n = into.shape
    first = torch.arange(batch, device=x.device)[:, None]
    column, copied = torch.where(into < 0, -1, into + first * m).flatten(), (index + first * n).flatten()
    summed = column >= 0
    count = torch.bincount(column[summed], minlength=batch * m)
    # rows alone in their column are there already: most of them, where few tokens are merged
    alone = (count.take(column) == 1) & (copied.take(column) == torch.arange(batch * n, device=x.device))
    if weight is not None:
        alone &= weight.flatten() == 1
    moved = (summed & ~alone).nonzero()[:, 0]
    rows = x.flatten(0, 1).index_select(0, moved).to(compute_dtype(x))
    if weight is not None:
        rows *= weight.flatten().index_select(0, moved)[:, None]
    columns, place, total = column.index_select(0, moved), None, kept.flatten(0, 1)
    if rows.dtype != kept.dtype:
        columns, place = columns.unique(return_inverse=True)
        total = rows.new_empty(len(columns), rows.shape[1])
    # -0.0 is the only start of a sum that leaves every value, -0.0 too, unchanged.
    at = columns if place is None else place
    total.index_fill_(0, at, -0.0).index_add_(0, at, rows)
    if place is not None:
        kept.flatten(0, 1).index_copy_(0, columns, total.to(x.dtype))
    return kept


def _merge_with_grad(x: Tensor, kept: Tensor, into: Tensor, weight: Tensor | None) -> Tensor:
    """`gather_merge` out of place, with static shapes and a spare column for dropped rows, for autograd."""
    (batch, n, d), m = x.shape, kept.shape[1]
    column = torch.where(into < 0, m, into)
    rows = x.to(compute_dtype(x))
    rows = rows if weight is None else rows * weight[..., None].to(rows.dtype)
    total = torch.full((batch, m + 1, d), -0.0, dtype=rows.dtype, device=x.device)
    total = total.scatter_add(1, column[..., None].expand(batch, n, d), rows)[:, :m]
    named = torch.zeros(batch, m + 1, dtype=torch.bool, device=x.device).scatter_(1, column, True)[
        :, :m, None
    ]
    return torch.where(named, total.to(x.dtype), kept)


@full_precision
def attention_rows(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None, reduce: str | None = None
) -> Tensor:
    (batch, heads, rows, d), (_, kv_heads, n, _) = q.shape, k.shape
    dtype = compute_dtype(q)
    logits = (q.to(dtype) * scale).reshape(batch, kv_heads, heads // kv_heads * rows, d) @ k.to(dtype).mT
    logits = logits.view(batch, heads, rows, n)
    if mask is None:
        probs = logits.softmax(-1)
    else:
        hidden = ~(mask[:, None, None] if mask.ndim == 2 else mask[:, None])
        probs = logits.masked_fill(hidden, torch.finfo(dtype).min).softmax(-1).masked_fill(hidden, 0.0)
    if reduce is None:
        return probs
    total = probs.sum((1, 2))
    return total / max(1, heads * rows) if reduce == "mean" else total


def windows_by_length(cu_seqlens: Tensor, n: int) -> dict[int, list[int]]:
    """Starts of the windows, by window length; raises ValueError for bounds that do not run from 0 to n."""
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != n or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {n} tokens given; found {bounds[:4]} ... {bounds[-2:]}."
        )
    groups: dict[int, list[int]] = {}
    for start, stop in pairwise(bounds):
        if stop > start:
            groups.setdefault(stop - start, []).append(start)
    return groups


@full_precision
def received_attention(
    q: Tensor, k: Tensor, scale: float, cu_seqlens: Tensor | None = None, chunk: int = 256
) -> Tensor:
    (batch, heads, n, _), kv_heads, dtype = q.shape, k.shape[1], compute_dtype(q)
    groups = {n: [0]} if cu_seqlens is None else windows_by_length(cu_seqlens, n)
    if not n or not batch or not groups:
        return q.new_zeros(batch, n, dtype=dtype)
    whole = len(groups) == 1
    parts, order = [], []
    for length, starts in groups.items():
        wq, wk = q, k
        if not whole:
            at = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten().to(q.device)
            order.append(at)
            wq, wk = q.index_select(2, at), k.index_select(2, at)
        # (B, Hk, group, W, L, d) against (B, Hk, 1, W, L, d); chunk * n logits per head at a time.
        wq = wq.unflatten(2, (-1, length)).unflatten(1, (kv_heads, heads // kv_heads))
        wk = wk.unflatten(2, (-1, length)).unsqueeze(2)
        step_w, step_q = max(1, chunk * n // length**2), max(1, min(length, chunk * n // length))
        for w in range(0, len(starts), step_w):
            keys = wk[:, :, :, w : w + step_w].to(dtype).mT
            total: Tensor | None = None
            for i in range(0, length, step_q):
                rows = wq[:, :, :, w : w + step_w, i : i + step_q].to(dtype) * scale
                got = (rows @ keys).softmax(-1).sum((1, 2, 4))
                total = got if total is None else total + got
            assert total is not None
            parts.append(total.flatten(1) / (heads * length))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out if whole else out.index_select(1, torch.cat(order).argsort())


def kv_gather(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    if not tensors:
        return []
    batch, _, n, _ = tensors[0].shape
    check_index(index, 0, n)
    if batch == 1:
        return [t.index_select(2, index[0]) for t in tensors]
    if not batch:
        return [t[:, :, : index.shape[1]].clone() for t in tensors]
    return [
        torch.stack([rows.index_select(1, at) for rows, at in zip(t, index, strict=True)]) for t in tensors
    ]


def check_ascending(index: Tensor) -> None:
    """Check index[b, j] >= j, for moving columns to the front in place; asserted without a sync on a GPU."""
    good = (index >= torch.arange(index.shape[1], device=index.device)).all()
    if index.device.type != "cpu":
        torch._assert_async(good, "kv_compact in place needs a strictly ascending index")
    elif not good:
        raise ValueError("kv_compact in place needs a strictly ascending index; sort it, or take copies.")


def kv_compact_(tensors: Sequence[Tensor], index: Tensor) -> None:
    check_ascending(index)
    for t in tensors:
        t[:, :, : index.shape[1]] = kv_gather([t], index)[0]


def unit_rows(x: Tensor) -> Tensor:
    x = x.to(compute_dtype(x))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
