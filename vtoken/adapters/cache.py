"""KV caches that report the logical length of a prompt and store the physical one.

`generate`, chat turns, `rope_deltas`, beams and assisted decoding all count prompt tokens with `get_seq_length()`. A cache
layer that stores P of L tokens therefore goes on reporting L; masks, which need the physical size, learn it through
`get_mask_sizes -> (kv_length, kv_offset)`, the pair that sliding layers use for the same purpose.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

LEDGER = "_vtoken_ledger"


@functools.cache
def logical_layer_class(cls: type) -> Any:
    """`cls`, a cache-layer class, made to count logical tokens.

    One base only, so that `layer.__class__ = logical_layer_class(type(layer))` is a legal layout change.
    """

    class Logical(cls):  # type: ignore[misc, valid-type]
        _layer_type = None  # transformers registers subclasses that name a layer type for the whole process
        dropped = 0  # logical tokens that have no slot here
        behind_stage: tuple[int, int] | None = None  # (slots that stage 0 has more, tokens dropped in stage 0)
        ledger: Ledger | None = None  # set on the first layer only, which sees every batch operation

        def physically(self, method: Any, *args: Any) -> Any:
            dropped, self.dropped = self.dropped, 0
            try:
                return method(*args)
            finally:
                self.dropped = dropped

        def physical_length(self) -> Any:
            return super().get_seq_length()

        def get_seq_length(self) -> Any:
            return super().get_seq_length() + self.dropped

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            kv_length, kv_offset = self.physically(super().get_mask_sizes, query_length)
            if self.behind_stage is None:
                return kv_length, kv_offset + self.dropped
            # The model makes one mask per attention type, from the first layer of that type, wherever that sits: every
            # layer answers for stage 0, and the layer hooks cut the columns down for later stages.
            more_slots, dropped = self.behind_stage
            window = self.max_cache_len if self.is_compileable else getattr(self, "sliding_window", None)
            if self.is_sliding and self.physical_length() + more_slots + query_length > window:
                raise NotImplementedError(
                    "Dropping inside the LLM cannot serve a sliding-window layer whose window is full: prune before the LLM."
                )
            return kv_length + (0 if self.is_compileable else more_slots), kv_offset + dropped

        def crop(self, tokens_to_remove: int) -> Any:
            out = self.physically(super().crop, tokens_to_remove)
            if self.ledger is not None:  # rejected drafts may reach into the prompt's tables
                self.ledger.follow(physical_length(self), grow=False)
            return out

        def reset(self) -> Any:
            self.dropped, self.behind_stage, self.ledger = 0, None, None
            return super().reset()

        def reorder_cache(self, beam_idx: Tensor) -> Any:
            if self.ledger is not None:
                self.ledger.select_rows(beam_idx)
            return super().reorder_cache(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> Any:
            if self.ledger is not None:
                rows = torch.arange(self.ledger.batch_size, device=self.ledger.device)
                self.ledger.select_rows(rows.repeat_interleave(repeats))
            return super().batch_repeat_interleave(repeats)

        def batch_select_indices(self, indices: Tensor) -> Any:
            if self.ledger is not None:
                self.ledger.select_rows(indices)
            return super().batch_select_indices(indices)

    Logical.__name__ = Logical.__qualname__ = "Logical" + cls.__name__
    Logical.__module__ = __name__
    globals()[Logical.__name__] = Logical  # picklable
    return Logical


def physical_length(layer: Any) -> int:
    """Tokens that a cache layer really stores."""
    return int(layer.physical_length() if hasattr(layer, "physical_length") else layer.get_seq_length())


def ledger_of(cache: Cache | None) -> Ledger | None:
    """The ledger of a cache that holds a shortened prompt, None if it holds none (any more)."""
    ledger = getattr(cache, LEDGER, None)
    if ledger is None or cache is None or not cache.layers[0].is_initialized:
        return None
    return ledger


def name_of(layer: Any) -> str:
    """The name of a cache layer's class before it was made to count logical tokens."""
    return type(layer).__name__.removeprefix("Logical")


def check_cache(cache: Cache, inside: bool, aligned: bool) -> None:
    """Raise NotImplementedError before the first token if this kind of cache cannot hold what a strategy leaves of a prompt.

    Args:
        inside: whether layers of the LLM will hold different numbers of tokens.
        aligned: whether stored keys and values will be cut once the prompt has been read.
    """
    for layer in cache.layers:
        known = isinstance(layer, (DynamicLayer, StaticLayer)) and not hasattr(layer, "conv_states")
        plain = known and not hasattr(layer, "_quantize") and not getattr(cache, "offloading", False)
        if (inside and not known) or (aligned and not plain):
            kind = "an offloaded cache" if getattr(cache, "offloading", False) else name_of(layer)
            instead = "a DynamicCache or StaticCache" if not known else "a DynamicCache or StaticCache, or align_cache=False"
            doing = "be shortened after prefill" if aligned and known else "hold layers of different lengths"
            raise NotImplementedError(f"This strategy needs a KV cache that can {doing}, found {kind}: use {instead}.")


def make_logical(cache: Cache, ledger: Ledger, num_layers: int, inside: bool = False, aligned: bool = False) -> None:
    """Let every layer of `cache` count logical tokens, and tie `ledger` to it; for the others see `check_cache`."""
    while getattr(cache, "layer_class_to_replicate", None) is not None and len(cache.layers) < num_layers:
        cache.layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
    check_cache(cache, inside, aligned)
    for layer in cache.layers:
        if not hasattr(layer, "physical_length"):
            layer.__class__ = logical_layer_class(type(layer))  # type: ignore[arg-type]
    cache.layers[0].ledger = ledger  # type: ignore[attr-defined]
    setattr(cache, LEDGER, ledger)


class Ledger:
    """Which logical token sits in which cache slot, one table per stage (stage 0 = before the LLM).

    The tables end with the last visual token's forward. Whatever follows is one slot per token in every layer, so that
    decoding never touches this object and needs no device synchronisation.

    Attributes:
        slots: per stage (batch, slots) int64, the logical index of a slot's token; -1 for filler.
        columns: per stage (batch, slots) int64, the slot of stage 0 that holds the same token.
        dropped: per stage, logical length minus number of slots.
        ragged: per stage, whether some slots are filler (kept on the host).
        shift: per stage (batch,) int64, tokens dropped so far, for `positions="renumber"`.
        tables: per LLM layer, the stage whose table describes its slots.
        pending: visual tokens still to come in a chunked prefill; see `plan.ChunkedPlan`.
    """

    def __init__(self, stages: int, batch_size: int, device: torch.device, tables: Sequence[int] = ()) -> None:
        self.slots = [torch.empty(batch_size, 0, dtype=torch.long, device=device) for _ in range(stages)]
        self.columns = list(self.slots)
        self.dropped = [0] * stages
        self.ragged = [False] * stages
        self.shift = [torch.zeros(batch_size, dtype=torch.long, device=device) for _ in range(stages)]
        self.tables = list(tables) or [0]
        self.pending: Any = None

    @property
    def end(self) -> int:
        """Logical tokens that the tables cover."""
        return self.slots[0].shape[1] + self.dropped[0]

    @property
    def batch_size(self) -> int:
        return self.slots[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.slots[0].device

    def select_rows(self, rows: Tensor) -> None:
        """Follow a batch operation of the cache (beam reordering, repetition, selection)."""
        rows = rows.to(self.device)
        self.slots = [t[rows] for t in self.slots]
        self.columns = [t[rows] for t in self.columns]
        self.shift = [t[rows] for t in self.shift]

    def follow(self, physical: int, grow: bool) -> None:
        """Adapt to the first layer's physical length: a crop may have reached into the prompt.

        With `grow`, the tokens stored since then (text, or an earlier image) are taken into the tables.
        """
        extra = physical - self.slots[self.tables[0]].shape[1]
        if extra < 0:
            self.slots = [t[:, :extra] for t in self.slots]
            self.columns = [t[:, :extra] for t in self.columns]
        elif grow and extra:
            new = torch.arange(extra, device=self.device).expand(self.batch_size, extra)
            end, width = self.end, self.slots[0].shape[1]
            self.slots = [torch.cat([t, end + new], 1) for t in self.slots]
            self.columns = [torch.cat([t, width + new], 1) for t in self.columns]

    def align(self, mask: Tensor) -> Tensor:
        """A 2-D mask over logical tokens -> one whose last columns line up with the slots of stage 0."""
        slots = self.slots[0]
        mask = mask.to(slots.device)
        past = mask.gather(1, slots.clamp(min=0)) * (slots >= 0).to(mask.dtype)
        return torch.cat([mask.new_ones(mask.shape[0], self.dropped[0]), past, mask[:, self.end :]], 1)

    def validity(self, stage: int, now: Tensor) -> Tensor:
        """The same for one stage where there was no mask; `now` (batch, m): validity of what follows the tables."""
        slots = self.slots[stage]
        return torch.cat([now.new_ones(now.shape[0], self.dropped[stage]), slots >= 0, now], 1)

    def append(self, stage: int, end: int, logical: Tensor, columns: Tensor, valid: Tensor, ragged: bool) -> None:
        """Enter what one forward stored: `logical` (batch, m) indices within that forward, filler where not `valid`."""
        self.slots[stage] = torch.cat([self.slots[stage], torch.where(valid, end + logical, -1)], 1)
        self.columns[stage] = torch.cat([self.columns[stage], columns], 1)
        self.ragged[stage] = self.ragged[stage] or ragged
