"""Cut attention masks of stage 0 to the tokens of a later stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .forward_context import Run

WINDOW_FULL = (
    "Dropping inside the LLM cannot serve a sliding-window layer whose window is full: prune before the LLM."
)


def sees_itself(mask: Any, past: int, otherwise: Tensor) -> Tensor:
    """(B, q) bool: tokens that are not padding by a 4-D mask, or one per layer type, after `past` columns."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return otherwise
    own = mask[:, 0].diagonal(past, -2, -1)
    if own.shape[-1] != otherwise.shape[1]:
        return otherwise
    return (own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2).expand_as(otherwise)


def both_ways(keys: Tensor, queries: int) -> Tensor:
    """(B, k) bool, keys that are no filler -> (B, 1, q, k) bool: attention in both directions; filler sees
    itself.
    """
    itself = torch.eye(queries, keys.shape[1], dtype=torch.bool, device=keys.device)
    return keys[:, None, None].bool() | itself.roll(keys.shape[1] - queries, 1)


def cut_mask(
    mask: Any,
    run: Run,
    stage: int,
    now: tuple[Tensor, Tensor] | None,
    current: int,
    static: int | None = None,
) -> Any:
    """Cut a mask of stage 0 to `stage`. Its columns are the slots of the tables, then all later tokens.

    With `now = (index, valid)`, the first `current` of the later tokens are the current tokens, of which
    `index` survive (columns and rows); without it, all tokens after the tables survive. `static` is the
    number of keys that a static cache will give, if it is not the mask's width.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise NotImplementedError(
            f"Attention masks of type {type(mask).__name__} cannot be cut: load the model with"
            " attn_implementation='sdpa'."
        )
    ledger, device = run.ledger, mask.device
    width, past_slots, batch = mask.shape[-1], ledger.slots[0].shape[1], ledger.batch_size
    if mask.ndim == 2 and now is not None and width == current:  # recurrent layers: current tokens only
        return mask.expand(batch, width).gather(1, now[0]) * now[1].to(mask.dtype)
    if width < past_slots + current:
        raise NotImplementedError(WINDOW_FULL)
    past = torch.arange(past_slots, device=device).expand(batch, -1) if stage == 0 else ledger.columns[stage]
    usable = ledger.slots[stage] >= 0
    index = None
    if now is not None:
        index, valid = now
        past, usable = torch.cat([past, past_slots + index], 1), torch.cat([usable, valid], 1)
        past_slots = past_slots + current
    rest = width - past_slots
    columns = torch.cat([past, torch.arange(past_slots, width, device=device).expand(batch, rest)], 1)
    usable = torch.cat([usable, usable.new_ones(batch, rest)], 1)
    off = 0 if mask.dtype == torch.bool or mask.ndim == 2 else torch.finfo(mask.dtype).min
    if mask.ndim == 2:  # flash attention
        return mask.expand(batch, width).gather(1, columns) * usable.to(mask.dtype)
    out = mask.expand(batch, *mask.shape[1:])
    if index is not None:
        out = out.gather(2, index[:, None, :, None].expand(batch, out.shape[1], index.shape[1], width))
    out = out.gather(3, columns[:, None, None].expand(batch, *out.shape[1:3], columns.shape[1]))
    out = out.masked_fill(~usable[:, None, None], off)
    width = width if static is None else static
    if run.static and out.shape[-1] < width:  # static keys have the length of the cache
        out = nn.functional.pad(out, (0, width - out.shape[-1]), value=off)
    return out
