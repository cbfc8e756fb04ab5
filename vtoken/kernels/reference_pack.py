"""Plain torch twins of the kernels that pack and read codes; `vtoken.kernels.packing` documents them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .reference import check_index, compute_dtype, kv_gather

CODES_PER_BYTE = {2: 8, 3: 5, 4: 4, 16: 2}


def width_of(codes: int, levels: int) -> int:
    """Bytes of so many packed codes."""
    return -(-codes // CODES_PER_BYTE[levels])


def pack_codes(codes: Tensor, levels: int) -> Tensor:
    per = CODES_PER_BYTE[levels]
    digits = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    powers = torch.tensor([levels**i for i in range(per)], dtype=torch.uint8, device=codes.device)
    return (digits * powers).sum(-1, dtype=torch.uint8)


@cache
def _digits(levels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, codes per byte): the codes in each byte."""
    powers = torch.tensor([levels**i for i in range(CODES_PER_BYTE[levels])])
    return (torch.arange(256)[:, None] // powers % levels).to(device, dtype)


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
    batch, heads, groups = packed.shape[:3]
    check_index(torch.empty(0) if index is None else index, 0, groups * tokens)
    if not packed.numel():
        return step.new_empty(batch, heads, 0 if index is None else index.shape[1], channels)
    dtype, (rows, columns) = compute_dtype(step), step.shape[3:]
    codes = _digits(levels, dtype, packed.device).index_select(0, packed.flatten().int()) - centre
    codes = codes.view(batch, heads, groups, -1)[..., : tokens * channels]
    # one number for a block of tokens and channels: (B, H, g, s, tokens / s, c, channels / c)
    codes = codes.reshape(batch, heads, groups, rows, tokens // rows, columns, channels // columns)
    out = codes * step.to(dtype)[:, :, :, :, None, :, None]
    if zero is not None:
        out += zero.to(dtype)[:, :, :, :, None, :, None]
    out = out.to(step.dtype).reshape(batch, heads, groups * tokens, channels)
    return out if index is None else kv_gather([out], index)[0]
