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


def choice_mask(
    slots: Tensor,
    mask: Any,
    now: tuple[Tensor, Tensor],
    kind: tuple[str, torch.dtype],
    hides: tuple[Tensor, Tensor] | None = None,
    static: int = 0,
) -> Any:
    """The mask of a layer whose attention reads some of its tokens, as queries and as keys.

    Args:
        slots: (B, p) int64, what the layer's cache holds, -1 for filler.
        mask: over these slots and all n tokens of the layer; None for attention as it is.
        now: rows (B, m) int64 of the tokens among the n, and (B, m) bool, which of them are no filler.
        kind: "flash", "both ways" or "causal", and the dtype of masks.
        hides: all n tokens are keys, and of these (B, n) bool are hidden from the queries (B, m) bool.
        static: keys that attention is given, if there are more than slots and tokens.
    """
    rows, there = now
    past, batch = slots.shape[1], len(rows)
    if mask is None and hides is None and (kind[0] == "flash" or not past) and bool(there.all()):
        return None
    columns, usable = rows, there
    if hides is not None:
        columns, usable = (
            torch.arange(hides[0].shape[1], device=rows.device).expand(batch, -1),
            hides[0] | True,
        )
    if kind[0] == "flash":
        return _flash_mask(mask, slots, columns, usable, hides)
    if mask is None:
        seen = columns[:, None] <= rows[..., None]
        seen = nn.functional.pad(seen | (kind[0] == "both ways"), (past, 0), value=True)[:, None]
        out = torch.zeros(seen.shape, dtype=kind[1], device=rows.device)
        out = out.masked_fill(~seen, torch.finfo(kind[1]).min)
    else:
        width = mask.shape[-1]
        out = mask.expand(batch, *mask.shape[1:])
        out = out.gather(2, rows[:, None, :, None].expand(batch, out.shape[1], rows.shape[1], width))
        at = torch.cat([torch.arange(past, device=rows.device).expand(batch, -1), past + columns], 1)
        out = out.gather(3, at[:, None, None].expand(batch, *out.shape[1:3], at.shape[1]))
    off = False if out.dtype == torch.bool else torch.finfo(out.dtype).min
    usable = torch.cat([slots >= 0, usable], 1)[:, None, None]
    lost = ~usable & ~_itself(rows, there, past, usable.shape[-1])
    if hides is not None:
        unseen = hides[0][:, None] & hides[1][..., None]
        lost = lost | nn.functional.pad(unseen, (past, 0))[:, None]
    return nn.functional.pad(out.masked_fill(lost, off), (0, max(0, static - out.shape[-1])), value=off)


def _itself(rows: Tensor, there: Tensor, past: int, width: int) -> Tensor:
    """(B, 1, m, width) bool: filler and its own key, as a row without keys has no softmax."""
    own = torch.eye(rows.shape[1], width - past, dtype=torch.bool, device=rows.device)
    return nn.functional.pad(own & ~there[..., None], (past, 0))[:, None]


def _flash_mask(
    mask: Any, slots: Tensor, columns: Tensor, usable: Tensor, hides: tuple[Tensor, Tensor] | None
) -> Tensor:
    """(B, slots + m): the keys that are there, as flash attention reads masks."""
    if hides is not None:
        raise NotImplementedError(
            "Flash attention cannot hide from the prompt what its answer, in the same forward, reads of the"
            " KV cache: load the model with attn_implementation='sdpa'."
        )
    past = slots >= 0
    if mask is None:
        return torch.cat([past, usable], 1).long()
    mask = mask.expand(len(slots), -1)
    width = slots.shape[1]
    return torch.cat([mask[:, :width] * past, mask.gather(1, width + columns) * usable], 1)
