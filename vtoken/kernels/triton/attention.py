"""Attention rows and received attention, in two passes over the keys: log-sum-exp, then probabilities."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .common import last_contiguous, multiprocessors, on_device, wide

MAX_HEAD_DIM = 256  # a whole head lies in shared memory; larger heads use the torch twin


@triton.jit
def _logits(q, k, scale, WIDE: tl.constexpr):
    """(rows, d) and (d, keys) -> float32 logits."""
    if WIDE:
        q, k = q.to(tl.float32), k.to(tl.float32)
    return tl.dot(q, k, input_precision="ieee") * scale


@triton.jit
def _add_exp(high, total, logits):
    """One step of the online log-sum-exp; rows that have seen nothing yet keep high = -inf and total = 0."""
    new = tl.maximum(high, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(high - base) + tl.sum(tl.exp(logits - base[:, None]), 1)


@triton.jit
def _load_rows(q, row, inside, group_rows, stride_head, stride_row, cols, d):
    """Query rows of one key head: row i is query i % group_rows of head i // group_rows."""
    at = (row // group_rows).to(tl.int64) * stride_head + (row % group_rows).to(tl.int64) * stride_row
    return tl.load(q + at[:, None] + cols[None, :], mask=inside[:, None] & (cols < d)[None, :], other=0.0)


@triton.jit(do_not_specialize=["group", "rows", "n", "splits", "split", "mask_batch", "mask_row"])
def _rows_lse(
    q, k, mask, out, parts, scale, group, rows, n, d, kv_heads, splits, split,
    q_batch, q_head, q_row, k_batch, k_head, k_row, mask_batch, mask_row, mask_key,
    MASKED: tl.constexpr, STORE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of one range of keys for a block of rows that share a key head; STORE keeps the logits."""
    part, pair = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    row = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside, cols = row < group * rows, tl.arange(0, BLOCK_D)
    queries = _load_rows(
        q + batch * q_batch + kv_head * group * q_head, row, inside, rows, q_head, q_row, cols, d
    )
    keys = k + batch * k_batch + kv_head * k_head
    place = (pair.to(tl.int64) * group * rows + row).to(tl.int64)
    high = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(part * split, tl.minimum((part + 1) * split, n), BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        block = tl.load(
            keys + key.to(tl.int64)[None, :] * k_row + cols[:, None],
            mask=(key < n)[None, :] & (cols < d)[:, None],
            other=0.0,
        )
        logits = _logits(queries, block, scale, WIDE)
        seen = inside[:, None] & (key < n)[None, :]
        if MASKED:
            at = mask + batch * mask_batch + (row % rows)[:, None] * mask_row + key[None, :] * mask_key
            logits = tl.where(tl.load(at, mask=seen, other=0) != 0, logits, float("-inf"))
        if STORE:
            tl.store(out + place[:, None] * n + key[None, :], logits, mask=seen)
        high, total = _add_exp(high, total, tl.where(seen, logits, float("-inf")))
    tl.store(parts + place * splits + part, high + tl.log(total), mask=inside)


@triton.jit
def _join(parts, place, inside, splits, BLOCK_S: tl.constexpr):
    """Log-sum-exp over the ranges of keys, (rows,); 0 for rows that see nothing."""
    part = tl.arange(0, BLOCK_S)
    lse = tl.load(
        parts + place[:, None] * splits + part[None, :],
        mask=inside[:, None] & (part < splits)[None, :],
        other=float("-inf"),
    )
    high = tl.max(lse, 1)
    high = tl.where(high == float("-inf"), 0.0, high)
    total = tl.sum(tl.exp(lse - high[:, None]), 1)
    return high + tl.where(total > 0, tl.log(tl.where(total > 0, total, 1.0)), 0.0)


@triton.jit(do_not_specialize=["n", "splits"])
def _rows_normalise(out, parts, n, splits, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    lse = _join(parts, place, place >= 0, splits, BLOCK_S)
    key = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at, inside = out + place[:, None] * n + key[None, :], (key < n)[None, :]
    tl.store(at, tl.exp(tl.load(at, mask=inside, other=0.0) - lse[:, None]), mask=inside)


@triton.jit(do_not_specialize=["group", "rows", "n", "kv_heads", "splits", "mask_batch", "mask_row"])
def _rows_reduce(
    q, k, mask, out, parts, scale, factor, group, rows, n, d, kv_heads, splits,
    q_batch, q_head, q_row, k_batch, k_head, k_row, mask_batch, mask_row, mask_key,
    MASKED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The probabilities of a block of keys, summed over all heads and rows."""
    batch = tl.program_id(1).to(tl.int64)
    key, cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    got = tl.zeros((BLOCK_N,), tl.float32)
    keys = k + batch * k_batch + key.to(tl.int64)[None, :] * k_row + cols[:, None]
    queries = q + batch * q_batch
    for kv_head in range(kv_heads):
        block = tl.load(keys, mask=(key < n)[None, :] & (cols < d)[:, None], other=0.0)
        for first in range(0, group * rows, BLOCK_R):
            row = first + tl.arange(0, BLOCK_R)
            inside = row < group * rows
            logits = _logits(
                _load_rows(queries, row, inside, rows, q_head, q_row, cols, d), block, scale, WIDE
            )
            lse = _join(parts, (batch * kv_heads + kv_head) * group * rows + row, inside, splits, BLOCK_S)
            seen = inside[:, None] & (key < n)[None, :]
            if MASKED:
                at = mask + batch * mask_batch + (row % rows)[:, None] * mask_row + key[None, :] * mask_key
                seen = seen & (tl.load(at, mask=seen, other=0) != 0)
            got += tl.sum(tl.where(seen, tl.exp(logits - lse[:, None]), 0.0), 0)
        keys += k_head
        queries += group * q_head
    tl.store(out + batch * n + key, got * factor, mask=key < n)


def attention_rows(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None, reduce: str | None = None
) -> Tensor:
    (batch, heads, rows, d), (_, kv_heads, n, _) = q.shape, k.shape
    if d > MAX_HEAD_DIM or not min(batch, heads, rows, n, d):
        return reference.attention_rows(q, k, scale, mask, reduce)
    group = heads // kv_heads
    q, k = last_contiguous(q), last_contiguous(k)
    seen, strides = q, [0, 0, 0]
    if mask is not None:
        seen = (mask if mask.ndim == 3 else mask[:, None]).expand(batch, rows, n).view(torch.uint8)
        strides = list(seen.stride())
    # Enough ranges of keys to fill the device, each long enough that the partial sums take little memory.
    blocks = batch * kv_heads * triton.cdiv(group * rows, 64)
    wanted = triton.cdiv(2 * multiprocessors(q.device), blocks)
    split = max(512, triton.cdiv(triton.cdiv(n, min(wanted, 32)), 64) * 64)
    splits = triton.cdiv(n, split)
    parts = torch.empty(batch, heads, rows, splits, dtype=torch.float32, device=q.device)
    out = torch.empty((batch, n) if reduce else (batch, heads, rows, n), dtype=torch.float32, device=q.device)
    side = 32 if wide(q) else 64
    block_r = min(side, max(16, triton.next_power_of_2(group * rows)))
    block_d, block_s = max(16, triton.next_power_of_2(d)), triton.next_power_of_2(splits)
    layout = (*q.stride()[:3], *k.stride()[:3], *strides)
    flags = dict(MASKED=mask is not None, WIDE=wide(q), BLOCK_R=block_r, BLOCK_D=block_d)
    with on_device(q):
        _rows_lse[(splits, batch * kv_heads, triton.cdiv(group * rows, block_r))](
            q, k, seen, out, parts, scale, group, rows, n, d, kv_heads, splits, split, *layout,
            STORE=reduce is None, BLOCK_N=side, **flags,
        )  # fmt: skip
        if reduce is None:
            block_n = min(2048, triton.next_power_of_2(n))
            grid = (batch * heads * rows, triton.cdiv(n, block_n))
            _rows_normalise[grid](out, parts, n, splits, BLOCK_S=block_s, BLOCK_N=block_n)
        else:
            factor = 1 / (heads * rows) if reduce == "mean" else 1.0
            _rows_reduce[(triton.cdiv(n, 32), batch)](
                q, k, seen, out, parts, scale, factor, group, rows, n, d, kv_heads, splits, *layout,
                BLOCK_N=32, BLOCK_S=block_s, **flags,
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["group", "heads", "n"])
def _window_lse(
    q, k, starts, stops, lse, scale, group, heads, n, d,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    WIDE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a block of queries over the keys of each one's own window."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    row, cols = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    at = q + batch * q_batch + head * q_head + row.to(tl.int64)[:, None] * q_row + cols[None, :]
    queries = tl.load(at, mask=(row < n)[:, None] & (cols < d)[None, :], other=0.0)
    keys = k + batch * k_batch + head // group * k_head
    start, stop = tl.load(starts + row, mask=row < n, other=n), tl.load(stops + row, mask=row < n, other=0)
    high = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for first in range(tl.min(start, 0), tl.max(stop, 0), BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        block = tl.load(
            keys + key.to(tl.int64)[None, :] * k_row + cols[:, None],
            mask=(key < n)[None, :] & (cols < d)[:, None],
            other=0.0,
        )
        own = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])
        high, total = _add_exp(
            high, total, tl.where(own, _logits(queries, block, scale, WIDE), float("-inf"))
        )
    tl.store(lse + tl.program_id(1).to(tl.int64) * n + row, high + tl.log(total), mask=row < n)


@triton.jit(do_not_specialize=["group", "heads", "n"])
def _window_received(
    q, k, starts, stops, lse, out, scale, group, heads, n, d,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    WIDE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention that a block of keys receives from the queries of each one's own window, for one head."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    key, cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    at = k + batch * k_batch + head // group * k_head + key.to(tl.int64)[None, :] * k_row + cols[:, None]
    block = tl.load(at, mask=(key < n)[None, :] & (cols < d)[:, None], other=0.0)
    queries = q + batch * q_batch + head * q_head
    start, stop = tl.load(starts + key, mask=key < n, other=n), tl.load(stops + key, mask=key < n, other=0)
    got = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(tl.min(start, 0), tl.max(stop, 0), BLOCK_Q):
        row = first + tl.arange(0, BLOCK_Q)
        rows = tl.load(
            queries + row.to(tl.int64)[:, None] * q_row + cols[None, :],
            mask=(row < n)[:, None] & (cols < d)[None, :],
            other=0.0,
        )
        row_lse = tl.load(lse + tl.program_id(1).to(tl.int64) * n + row, mask=row < n, other=0.0)
        own = (row[:, None] >= start[None, :]) & (row[:, None] < stop[None, :])
        got += tl.sum(tl.where(own, tl.exp(_logits(rows, block, scale, WIDE) - row_lse[:, None]), 0.0), 0)
    length = tl.where(stop > start, stop - start, 1).to(tl.float32)
    tl.store(out + tl.program_id(1).to(tl.int64) * n + key, got / length, mask=key < n)


def received_attention(
    q: Tensor, k: Tensor, scale: float, cu_seqlens: Tensor | None = None, chunk: int = 256
) -> Tensor:
    (batch, heads, n, d), kv_heads = q.shape, k.shape[1]
    if d > MAX_HEAD_DIM or not min(batch, heads, n, d):
        return reference.received_attention(q, k, scale, cu_seqlens, chunk)
    q, k = last_contiguous(q), last_contiguous(k)
    bounds = torch.tensor([0, n]) if cu_seqlens is None else cu_seqlens
    if not bounds.is_cuda:
        reference.windows_by_length(bounds, n)
    bounds = bounds.to(q.device, torch.int32)
    window = torch.searchsorted(bounds, torch.arange(n, dtype=torch.int32, device=q.device), right=True)
    starts, stops = bounds[window - 1], bounds[window]
    lse, out = (torch.empty(batch, heads, n, dtype=torch.float32, device=q.device) for _ in range(2))
    shape = (scale, heads // kv_heads, heads, n, d, *q.stride()[:3], *k.stride()[:3])
    block = 64 if d <= 128 and not wide(q) else 32
    grid = (triton.cdiv(n, block), batch * heads)
    flags = dict(WIDE=wide(q), BLOCK_Q=block, BLOCK_K=block, BLOCK_D=max(16, triton.next_power_of_2(d)))
    with on_device(q):
        _window_lse[grid](q, k, starts, stops, lse, *shape, **flags)
        _window_received[grid](q, k, starts, stops, lse, out, *shape, **flags)
    return out.mean(1)
