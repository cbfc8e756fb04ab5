"""Codes of less than a byte: pack them, and read them back with the scales of their groups."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .greedy import shape_of
from .reference_pack import CODES_PER_BYTE, width_of

__all__ = ["pack_codes", "unpack_rows", "width_of"]


def pack_codes(codes: Tensor, levels: int) -> Tensor:
    """Pack codes into bytes as the digits of a number of base `levels`, the first one lowest.

    A byte takes 8 codes of 2 levels, 5 of 3 (1.6 bits each), 4 of 4 or 2 of 16.

    Args:
        codes: (..., n) uint8, below `levels`. On a GPU a larger one is the caller's error.
        levels: 2, 3, 4 or 16.

    Returns (..., `width_of(n, levels)`) uint8. Raises ValueError for other levels, types or codes.
    """
    _check_levels("pack_codes", levels)
    if codes.dtype != torch.uint8 or not codes.ndim:
        raise ValueError(f"pack_codes takes uint8 codes (..., n); found {codes.dtype} {shape_of(codes)}.")
    if codes.device.type == "cpu" and not torch.compiler.is_compiling() and codes.numel():
        most = int(codes.max())
        if most >= levels:
            raise ValueError(f"pack_codes takes codes below {levels}; found {most}.")
    return ops.pack_codes(codes, levels)


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
    """Read packed groups of tokens: `(code - centre) * step + zero`, of all tokens or those in `index`.

    Args:
        packed: (B, H, g, w) uint8: g groups of `tokens` x `channels` codes, packed as by `pack_codes` with
            the channels of the first token first.
        step: (B, H, g, s, c) floating point: one number for `tokens / s` tokens and `channels / c` channels.
        zero: as `step`, None for 0.
        levels: 2, 3, 4 or 16.
        centre: subtracted from each code.
        tokens, channels: of a group.
        index: (B, m) int, the tokens wanted, counted over the groups; None for all of them in order.

    Returns (B, H, m or g * tokens, channels) in the dtype of `step`, computed in float32. Raises ValueError
    for shapes that do not fit, IndexError for an index out of range (on the CPU).
    """
    _check_levels("unpack_rows", levels)
    fits = packed.ndim == 4 and packed.shape[3] == width_of(tokens * channels, levels)
    fits = fits and step.ndim == 5 and step.shape[:3] == packed.shape[:3]
    if not fits or tokens % step.shape[3] or channels % step.shape[4]:
        raise ValueError(
            f"unpack_rows takes packed (B, H, g, w) and step (B, H, g, s, c) of groups of {tokens} x"
            f" {channels} codes; found {shape_of(packed)} and {shape_of(step)}."
        )
    if zero is not None and zero.shape != step.shape:
        raise ValueError(f"unpack_rows takes zero of the shape of step; found {shape_of(zero)}.")
    if index is not None and (index.ndim != 2 or index.shape[0] != packed.shape[0]):
        raise ValueError(f"unpack_rows takes index ({packed.shape[0]}, m); found {shape_of(index)}.")
    return ops.unpack_rows(packed, step, zero, levels, centre, tokens, channels, index)


def _check_levels(name: str, levels: int) -> None:
    if levels not in CODES_PER_BYTE:
        raise ValueError(f"{name} takes 2, 3, 4 or 16 levels; found {levels}.")
