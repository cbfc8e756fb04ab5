"""Rows that hold several prompts, packed without padding: find the prompts and keep them apart.

Without a mask and a cache, transformers reads positions that start again within a row as packed prompts.
The kept tokens of a shortened row have gaps in their positions, so its rule no longer holds: this module
finds the prompts on the whole row, by positions that do not grow. Positions that have gaps, or begin at
another number than 0, are one prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .transformers_names import cache_argument, recomputes

MAKERS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def packed_rows(decoder: Any, kwargs: dict[str, Any], mask: Any, cache: Any) -> Tensor | None:
    """The first column of the prompt that each token belongs to, (B, q) int64; None if no row holds several.

    Args:
        decoder: the language model, about to be called with `kwargs`.
        mask: the mask that its base model was given.
        cache: an empty one, or None.

    Raises:
        NotImplementedError: for several packed rows under flash attention, which cannot tell them apart.
    """
    embeds = kwargs["inputs_embeds"]
    batch, length = embeds.shape[:2]
    flash = "flash" in (decoder.config._attn_implementation or "")
    if flash and isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all()):
        mask = None  # as flash attention reads it
    if mask is not None or length == 1:
        return None
    if flash and batch == 1 and kwargs.get(LENGTHS[0]) is not None:
        ends = kwargs[LENGTHS[0]].to(embeds.device).long()
        starts = torch.zeros(1, length, dtype=torch.bool, device=embeds.device)
        starts[0, ends[:-1]] = True
    else:
        positions = _text_positions(kwargs.get("position_ids"))
        if positions is None or not (flash or (cache is None and _without_cache(decoder, kwargs))):
            return None
        positions = positions.to(embeds.device).expand(batch, length)
        starts = torch.nn.functional.pad(positions.diff(dim=1) <= 0, (1, 0), value=True)
    if not bool(starts[:, 1:].any()):
        return None
    if flash and batch > 1:
        raise NotImplementedError(
            f"Flash attention tells packed prompts apart in a batch of one row only, found {batch} rows with"
            " positions that start again: pack them into one row, or load the model with"
            " attn_implementation='sdpa'."
        )
    return torch.where(starts, torch.arange(length, device=embeds.device), 0).cummax(1).values


def _text_positions(positions: Any) -> Tensor | None:
    """The row of position ids that counts tokens, (1 or B, q); three rows of a multimodal rope do not."""
    if not isinstance(positions, Tensor):
        return None
    if positions.ndim == 3:
        return positions[0] if len(positions) == 4 else None
    return positions if positions.ndim == 2 else None


def _without_cache(decoder: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a decoder that is given no cache makes none of its own."""
    use = kwargs.get("use_cache")
    use = getattr(decoder.config, "use_cache", True) if use is None else use
    return not use or recomputes(decoder)


def ranks_of(first: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Places of kept tokens within their prompts, (B, n) int64 from 0; each filler is its own prompt.

    Args:
        first: (B, q), the result of `packed_rows`.
        index, valid: (B, n), the result of `right_aligned`.
    """
    column = torch.arange(index.shape[1], device=index.device)
    prompt = torch.where(valid, first.gather(1, index), -1 - column)
    starts = torch.nn.functional.pad(prompt.diff(dim=1) != 0, (1, 0), value=True)
    return column - torch.where(starts, column, 0).cummax(1).values


def packed_mask(config: Any, embeds: Tensor, ranks: Tensor) -> Any:
    """The mask that keeps packed prompts apart, made by transformers; per layer type if there are several.

    Args:
        config: the language model's config.
        embeds: (B, n, d), its next input.
        ranks: (B, n) int64, see `ranks_of`.

    Raises:
        NotImplementedError: for layers of another type than full and sliding attention.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"}
    if odd := sorted(kinds - set(MAKERS)):
        raise NotImplementedError(
            f"Packed prompts cannot be shortened for layers of type {', '.join(odd)}: give each prompt a row"
            " of its own."
        )
    masks = {}
    for kind in kinds:
        given = {cache_argument(MAKERS[kind]): None, "position_ids": ranks}
        masks[kind] = MAKERS[kind](config=config, inputs_embeds=embeds, attention_mask=None, **given)
    return masks if len(masks) > 1 else masks[kinds.pop()]


def packed_lengths(kwargs: dict[str, Any], ranks: Tensor | None) -> dict[str, Any]:
    """`kwargs` with the lengths of the shortened prompts, if they had those of the whole prompts.

    Without packed prompts the lengths are removed: those of a whole prompt would exceed the shortened one.

    Args:
        ranks: (1, n) int64, see `ranks_of`; None if every row is one prompt.
    """
    if ranks is None:
        return {k: v for k, v in kwargs.items() if k not in LENGTHS}
    if kwargs.get(LENGTHS[0]) is None:
        return kwargs
    starts = (ranks[0] == 0).nonzero()[:, 0]
    ends = torch.cat([starts, starts.new_tensor([ranks.shape[1]])]).to(kwargs[LENGTHS[0]])
    longest = int(ends.diff().max())
    return kwargs | dict(zip(LENGTHS, (ends, ends, longest, longest), strict=True))


def within(first: Tensor, final: Tensor, column: Tensor) -> Tensor:
    """Columns within each token's own prompt: the next one if the nearest kept token is another prompt's.

    Args:
        first: (B, q), the result of `packed_rows`.
        final: (B, n) int64, the position of every column.
        column: (B, q) int64, the column of each position, -1 where its token was dropped.
    """
    n = final.shape[1]
    before = column.cummax(1).values
    after = torch.where(column < 0, n, column).flip(1).cummin(1).values.flip(1).clamp(max=n - 1)
    elsewhere = (before < 0) | (final.gather(1, before.clamp(min=0)) < first)
    return torch.where(elsewhere, after, before)


def apart(
    assigned: list[tuple[int, Tensor, list[Any]]], first: Tensor | None, beams: int
) -> list[tuple[int, Tensor, list[Any]]]:
    """The images of each row, one entry per packed prompt: (row, places of its visual tokens, its images)."""
    if first is None:
        return assigned
    out = []
    for b, places, items in assigned:
        blocks = places.split([len(item) for item in items])
        prompts = [int(first[b * beams, block[0]]) for block in blocks]
        for prompt in sorted(set(prompts)):
            mine = [i for i, p in enumerate(prompts) if p == prompt]
            out.append((b, torch.cat([blocks[i] for i in mine]), [items[i] for i in mine]))
    return out
