"""Triton kernels that move rows: gather, gather with absorption, and compaction of a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import check_ascending, check_index
from .common import last_contiguous, on_device

COUNTED = 16384  # rows up to which ordering them by counting (n^2 compares) beats a sort


@triton.jit(do_not_specialize=["n", "m", "stride"])
def _order_by_column(into, order, bounds, n, m, stride, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Counting sort of rows by their target column.

    Item i < n is row i, item n + j the start of column j; the place of each is the number of rows before it.
    Rows without a column come last.
    """
    batch = tl.program_id(1).to(tl.int64)
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = item < n
    key = tl.load(into + batch * stride + item, mask=is_row, other=0).to(tl.int32)
    key = tl.where(is_row, tl.where(key < 0, m, key), item - n)
    rank = tl.where(is_row, item, -1)
    place = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n, BLOCK_N):
        other = first + tl.arange(0, BLOCK_N)
        other_key = tl.load(into + batch * stride + other, mask=other < n, other=0).to(tl.int32)
        other_key = tl.where(other_key < 0, m, other_key)
        before = (other_key[None, :] < key[:, None]) | (
            (other_key[None, :] == key[:, None]) & (other[None, :] < rank[:, None])
        )
        place += tl.sum((before & (other < n)[None, :]).to(tl.int32), 1)
    tl.store(order + batch * n + place, item, mask=is_row)
    tl.store(bounds + batch * (m + 1) + item - n, place, mask=(item >= n) & (item <= n + m))


@triton.jit(do_not_specialize=["n", "m", "index_batch", "weight_batch"])
def _gather_merge(
    x, index, order, bounds, weight, out, n, m, d, x_batch, x_row, index_batch, weight_batch,
    MERGE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, column = (tl.program_id(0) // m).to(tl.int64), (tl.program_id(0) % m).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < d
    source, target = x + batch * x_batch + cols, out + (batch * m + column) * d + cols
    start, stop = 0, 0
    if MERGE:
        start = tl.load(bounds + batch * (m + 1) + column)
        stop = tl.load(bounds + batch * (m + 1) + column + 1)
    if start == stop:
        row = tl.load(index + batch * index_batch + column)
        tl.device_assert((row >= 0) & (row < n), "index out of range")
        tl.store(target, tl.load(source + row * x_row, mask=inside), mask=inside)
    else:
        total = tl.zeros((BLOCK_D,), tl.float32)
        for place in range(start, stop):
            row = tl.load(order + batch * n + place).to(tl.int64)
            value = tl.load(source + row * x_row, mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                value *= tl.load(weight + batch * weight_batch + row).to(tl.float32)
            total = tl.where(place == start, value, total + value)  # 0.0 + -0.0 would have other bits
        tl.store(target, total.to(out.dtype.element_ty), mask=inside)


def gather_merge(
    x: Tensor, index: Tensor, into: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    (batch, n, d), m = x.shape, index.shape[1]
    out = x.new_empty(batch, m, d)
    check_index(index, 0, n)
    if not out.numel():
        return out
    x, index = last_contiguous(x), last_contiguous(index)
    order = bounds = index
    if into is not None:
        check_index(into, -1, m, "into")
        into, weight = last_contiguous(into), None if weight is None else last_contiguous(weight)
        order = torch.empty(batch, n, dtype=torch.int32, device=x.device)
        bounds = torch.empty(batch, m + 1, dtype=torch.int32, device=x.device)
    with on_device(x):
        if into is not None and n <= COUNTED:
            grid = (triton.cdiv(n + m + 1, 64), batch)
            _order_by_column[grid](into, order, bounds, n, m, into.stride(0), BLOCK=64, BLOCK_N=64)
        elif into is not None:
            column, order = into.masked_fill(into < 0, m).sort(dim=1, stable=True)
            order = order.contiguous()
            bounds = torch.searchsorted(
                column.contiguous(), torch.arange(m + 1, device=x.device).repeat(batch, 1)
            )
        block = min(4096, triton.next_power_of_2(d))
        _gather_merge[(batch * m, triton.cdiv(d, block))](
            x, index, order, bounds, weight, out, n, m, d, x.stride(0), x.stride(1), index.stride(0),
            0 if weight is None else weight.stride(0), MERGE=into is not None, WEIGHTED=weight is not None,
            BLOCK_D=block, num_warps=4 if block >= 1024 else 2,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["batches", "heads", "m", "index_batch"])
def _move_rows(
    table, index, batches, heads, m, index_batch,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, STEP: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Move rows of several tensors, one job per tensor.

    Table rows hold source, target, their strides over batch, head and row, and the row width, counted in UNIT
    elements and multiples of STEP; everything is aligned to ALIGN bytes.
    """
    group = tl.program_id(0)
    columns = 0
    if not IN_PLACE:
        steps = tl.cdiv(m, BLOCK_M)
        columns, group = group % steps, group // steps
    head, batch, job = (
        (group % heads).to(tl.int64),
        (group // heads % batches).to(tl.int64),
        group // heads // batches,
    )
    entry = table + job.to(tl.int64) * 9
    width = tl.multiple_of(tl.load(entry + 8), STEP)
    if tl.program_id(1) * BLOCK_W < width:
        source = tl.load(entry).to(tl.pointer_type(UNIT))
        target = tl.load(entry + 1).to(tl.pointer_type(UNIT))
        source = tl.multiple_of(source + batch * tl.load(entry + 2) + head * tl.load(entry + 3), ALIGN)
        target = tl.multiple_of(target + batch * tl.load(entry + 5) + head * tl.load(entry + 6), ALIGN)
        source_row, target_row = (
            tl.multiple_of(tl.load(entry + 4), STEP),
            tl.multiple_of(tl.load(entry + 7), STEP),
        )
        cols = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        for first in range(columns * BLOCK_M, m if IN_PLACE else (columns + 1) * BLOCK_M, BLOCK_M):
            column = first + tl.arange(0, BLOCK_M)
            row = tl.load(index + batch * index_batch + column, mask=column < m, other=0)
            inside = (column < m)[:, None] & (cols < width)[None, :]
            value = tl.load(source + row[:, None] * source_row + cols[None, :], mask=inside)
            if IN_PLACE:
                tl.debug_barrier()  # a row may be the target of one warp and the source of another
            tl.store(target + column.to(tl.int64)[:, None] * target_row + cols[None, :], value, mask=inside)


_UNITS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


def _move(pairs: list[tuple[Tensor, Tensor]], index: Tensor, in_place: bool) -> None:
    """Copy row index[b, j] of every source (B, H, n, d) to row j of its target (B, H, m or n, d)."""
    m, rows = index.shape[1], []
    batch, heads = pairs[0][0].shape[:2]
    for source, target in pairs:
        size = source.element_size()
        strides = [s * size for t in (source, target) for s in t.stride()[:3]]
        rows.append([source.data_ptr(), target.data_ptr(), *strides, source.shape[3] * size])
    common = gcd(*(v for row in rows for v in row), 16)
    unit = min(common, 8)
    table = torch.tensor([[*row[:2], *(v // unit for v in row[2:])] for row in rows])
    if index.is_cuda:
        table = table.pin_memory().to(index.device, non_blocking=True)
    width = max(int(row[8]) for row in rows) // unit
    block_w = min(512, triton.next_power_of_2(width))
    block_m = max(1, min(triton.next_power_of_2(m), 2048 // block_w, 64))
    groups = len(pairs) * batch * heads * (1 if in_place else triton.cdiv(m, block_m))
    index = last_contiguous(index)
    with on_device(index):
        _move_rows[(groups, triton.cdiv(width, block_w))](
            table, index, batch, heads, m, index.stride(0),
            UNIT=_UNITS[unit], ALIGN=common, STEP=common // unit,
            IN_PLACE=in_place, BLOCK_M=block_m, BLOCK_W=block_w,
        )  # fmt: skip


def gather_rows(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    outs, pairs = [], []
    for x in tensors:
        check_index(index, 0, x.shape[1])
        outs.append(x.new_empty(*index.shape, *x.shape[2:]))
        if outs[-1].numel():
            # One row of any trailing shape is one run of bytes; the few planes without this are small.
            flat = x.reshape(*x.shape[:2], 1, -1) if x.ndim > 2 else x[..., None, None]
            flat = flat if flat.stride(3) == 1 or flat.shape[3] == 1 else flat.contiguous()
            pairs.append((flat.transpose(1, 2), outs[-1].view(*index.shape, 1, -1).transpose(1, 2)))
    if pairs:
        _move(pairs, index, in_place=False)
    return outs


def kv_gather(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    for t in tensors:
        check_index(index, 0, t.shape[2])
    outs = [t.new_empty(*t.shape[:2], index.shape[1], t.shape[3]) for t in tensors]
    pairs = [(last_contiguous(t), out) for t, out in zip(tensors, outs, strict=True) if out.numel()]
    if pairs:
        _move(pairs, index, in_place=False)
    return outs


def kv_compact_(tensors: Sequence[Tensor], index: Tensor) -> None:
    check_ascending(index)
    for t in tensors:
        check_index(index, 0, t.shape[2])
        if t.stride(3) != 1 and t.shape[3] > 1:
            raise ValueError(
                f"kv_compact in place needs contiguous head channels; found strides {t.stride()}."
            )
    pairs = [(t, t) for t in tensors if t.numel() and index.numel()]
    if pairs:
        _move(pairs, index, in_place=True)
