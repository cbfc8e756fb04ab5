"""Triton kernels for codes of less than a byte: pack them, and read rows with the scales of their groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import check_index
from ..reference_pack import CODES_PER_BYTE, width_of
from .common import last_contiguous, on_device


@triton.jit(do_not_specialize=["rows", "n", "width", "stride"])
def _pack(
    codes, out, rows, n, width, stride, LEVELS: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, byte = item // width, item % width
    inside = row < rows
    total, power = tl.zeros((BLOCK,), tl.int32), 1
    for digit in tl.static_range(PER):
        place = byte * PER + digit
        code = tl.load(codes + row * stride + place, mask=inside & (place < n), other=0)
        total += code.to(tl.int32) * power
        power = power * LEVELS
    tl.store(out + item, total.to(tl.uint8), mask=inside)


def pack_codes(codes: Tensor, levels: int) -> Tensor:
    n, width = codes.shape[-1], width_of(codes.shape[-1], levels)
    out = codes.new_empty(*codes.shape[:-1], width)
    if not out.numel():
        return out
    flat = last_contiguous(codes.reshape(-1, n))
    with on_device(codes):
        _pack[(triton.cdiv(out.numel(), 1024),)](
            flat, out, flat.shape[0], n, width, flat.stride(0), LEVELS=levels, PER=CODES_PER_BYTE[levels],
            BLOCK=1024,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["m", "heads", "groups", "index_batch"])
def _unpack(
    packed, step, zero, index, out, m, heads, groups, index_batch, centre,
    LEVELS: tl.constexpr, PER: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ZERO: tl.constexpr,
    GATHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows of one head; ROWS x COLUMNS numbers of `step` for a group of TOKENS x CHANNELS codes."""
    head = tl.program_id(1).to(tl.int64)  # over batch and heads
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_C)
    row = place.to(tl.int64)
    if GATHER:
        row = tl.load(index + head // heads * index_batch + place, mask=place < m, other=0).to(tl.int64)
        tl.device_assert((row >= 0) & (row < groups * TOKENS), "index out of range")
    inside = (place < m)[:, None] & (channel < CHANNELS)[None, :]
    group, token = head * groups + row // TOKENS, row % TOKENS
    element = token[:, None] * CHANNELS + channel[None, :]
    byte = tl.load(packed + group[:, None] * WIDTH + element // PER, mask=inside, other=0).to(tl.int32)
    digit = (element % PER).to(tl.int32)
    if LEVELS == 3:
        power = tl.where(digit == 1, 3, 1)
        power = tl.where(digit == 2, 9, power)
        power = tl.where(digit == 3, 27, power)
        power = tl.where(digit == 4, 81, power)
        code = byte // power % 3
    else:
        bits: tl.constexpr = 8 // PER
        code = (byte >> (digit * bits)) & (LEVELS - 1)
    block = (token // (TOKENS // ROWS))[:, None] * COLUMNS + (channel // (CHANNELS // COLUMNS))[None, :]
    at = group[:, None] * (ROWS * COLUMNS) + block
    value = (code.to(tl.float32) - centre) * tl.load(step + at, mask=inside, other=0.0).to(tl.float32)
    if ZERO:
        value += tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)
    target = out + (head * m + place)[:, None] * CHANNELS + channel[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=inside)


def unpack_rows(
    packed: Tensor,
    step: Tensor,
    zero: Tensor | None,
    levels: int,
    centre: float,
    tokens: int,
    channels: int,
    index: Tensor | None = None,
) -> Tensor:
    batch, heads, groups, width = packed.shape
    m = groups * tokens if index is None else index.shape[1]
    out = torch.empty(batch, heads, m, channels, dtype=step.dtype, device=step.device)
    check_index(torch.empty(0) if index is None else index, 0, groups * tokens)
    if not out.numel():
        return out
    packed, step = packed.contiguous(), step.contiguous()
    zero = None if zero is None else zero.contiguous()
    index = None if index is None else last_contiguous(index)
    block_c = triton.next_power_of_2(channels)
    block_m = max(1, min(triton.next_power_of_2(m), 4096 // block_c))
    with on_device(packed):
        _unpack[(triton.cdiv(m, block_m), batch * heads)](
            packed, step, zero, index, out, m, heads, groups, 0 if index is None else index.stride(0),
            float(centre), LEVELS=levels, PER=CODES_PER_BYTE[levels], TOKENS=tokens, CHANNELS=channels,
            WIDTH=width, ROWS=step.shape[3], COLUMNS=step.shape[4], ZERO=zero is not None,
            GATHER=index is not None, BLOCK_M=block_m, BLOCK_C=block_c,
        )  # fmt: skip
    return out
