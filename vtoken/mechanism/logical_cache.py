"""KV caches that report the logical length of a prompt and store fewer tokens.

`generate`, chat turns, `rope_deltas`, beams and assisted decoding all count prompt tokens with
`get_seq_length()`. A cache layer that stores P of L tokens therefore reports L. Masks need the physical
size and get it through `get_mask_sizes -> (kv_length, kv_offset)`, the pair that sliding layers use for
the same purpose. All other lengths and indices (`crop`, `get_max_length`, batch operations) count prompt
tokens as well.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .cache_crop import crop_layer, name_of, physical_length
from .ledger import Ledger
from .recurrent_states import check_announced, counting_layers, has_length, has_state, state_layer_class


@functools.cache
def logical_layer_class(cls: type) -> Any:
    """A subclass of the cache-layer class `cls` that counts logical tokens.

    There is one base only, so that `layer.__class__ = logical_layer_class(type(layer))` is a legal change.
    """

    class Logical(cls):  # type: ignore[misc, valid-type]
        _layer_type = None  # transformers registers subclasses that name a layer type for the whole process
        dropped = 0  # logical tokens that have no slot here
        # (slots of stage 0 in excess of this stage's, tokens dropped in stage 0)
        after_stage: tuple[int, int] | None = None
        ledger: Ledger | None = None
        number = 0  # of the LLM layer

        def __reduce__(self) -> Any:  # makes the class again if it does not exist yet
            return _empty_layer, (cls,), self.__dict__

        def update(self, *args: Any, **kwargs: Any) -> Any:
            check_announced(self.ledger)
            return super().update(*args, **kwargs)

        def its_own(self, method: str) -> Any:
            if not hasattr(super(), method):
                raise NotImplementedError(
                    f"A {cls.__name__} of this transformers has no {method}: use a DynamicCache."
                )
            return getattr(super(), method)

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

        def get_max_length(self) -> int:
            """Logical tokens that fit; a window counts survivors, and -1 means no limit."""
            slots = int(super().get_max_length())
            return slots if slots < 0 or self.is_sliding else slots + self.dropped

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            kv_length, kv_offset = self.physically(super().get_mask_sizes, query_length)
            if self.after_stage is None:
                return kv_length, kv_offset + self.dropped
            # The model makes one mask per attention type, from the first layer of that type, at any stage:
            # every layer answers for stage 0, and the layer hooks cut the columns for later stages.
            more_slots, dropped = self.after_stage
            window = self.max_cache_len if self.is_compileable else getattr(self, "sliding_window", None)
            if self.is_sliding and self.physical_length() + more_slots + query_length > window:
                raise NotImplementedError(
                    "Dropping inside the LLM cannot serve a sliding-window layer whose window is full: prune"
                    " before the LLM."
                )
            return kv_length + (0 if self.is_compileable else more_slots), kv_offset + dropped

        def crop(self, tokens_to_remove: int) -> Any:
            """Remove the last `-tokens_to_remove` logical tokens; layers of a cache are cropped in order."""
            crop_slots = self.its_own("crop")
            if self.ledger is None or not self.is_initialized or tokens_to_remove == 0:
                return self.physically(crop_slots, tokens_to_remove)
            if tokens_to_remove > 0:  # a length to crop to in older releases; newer ones raise
                DynamicLayer.crop(DynamicLayer(), tokens_to_remove)
                tokens_to_remove = min(0, tokens_to_remove - int(self.get_seq_length()))
            return crop_layer(self, -tokens_to_remove, crop_slots)

        def reset(self) -> None:
            held, self.ledger = self.ledger, None
            self.dropped, self.after_stage = 0, None
            super().reset()
            if held is not None and isinstance(self, DynamicLayer):  # older releases keep as many zeros
                self.keys = self.values = None
                self.is_initialized = False

        def reorder_cache(self, beam_idx: Tensor) -> Any:
            out = self.its_own("reorder_cache")(beam_idx)
            self.moved(beam_idx)
            return out

        def batch_repeat_interleave(self, repeats: int) -> Any:
            out = self.its_own("batch_repeat_interleave")(repeats)
            if self.ledger is not None and self.number == self.ledger.counter:
                rows = torch.arange(self.ledger.batch_size, device=self.ledger.device)
                self.moved(rows.repeat_interleave(repeats))
            return out

        def batch_select_indices(self, indices: Any) -> Any:
            out = self.its_own("batch_select_indices")(indices)
            self.moved(indices)
            return out

        def moved(self, rows: Any) -> None:
            if self.ledger is not None and self.number == self.ledger.counter:
                self.ledger.select_rows(rows)

    Logical.__name__ = Logical.__qualname__ = "Logical" + cls.__name__
    Logical.__module__ = __name__
    return Logical


def _empty_layer(cls: type) -> Any:
    """A stateless layer of the logical class of `cls`, for copies and pickles."""
    logical = logical_layer_class(cls)
    return logical.__new__(logical)


def ledger_of(cache: Cache | None) -> Ledger | None:
    """The ledger of a cache with a shortened prompt; None if it has none, or no longer."""
    layers = counting_layers(cache)
    if not layers or not layers[0].is_initialized:
        return None
    return getattr(layers[0], "ledger", None)


def slots_in(cache: Cache) -> int:
    """Number of tokens that the first layer with a length stores."""
    return physical_length(counting_layers(cache)[0])


def check_cache(cache: Cache, inside: bool, aligned: bool) -> None:
    """Raise NotImplementedError before the first token if a cache cannot hold a strategy's shortened prompt.

    Args:
        inside: whether layers of the LLM will hold different numbers of tokens.
        aligned: whether stored keys and values will be cut once the prompt has been read.
    """
    if not hasattr(cache, "layers"):
        raise NotImplementedError(
            f"vtoken needs a KV cache that consists of layers, found {type(cache).__name__}: use a"
            " DynamicCache."
        )
    if cache.layers and not counting_layers(cache):
        raise NotImplementedError(
            "vtoken counts the tokens of a prompt in the attention layers of a KV cache, found only layers"
            f" without a length ({name_of(cache.layers[0])}): use a model that has attention layers."
        )
    for layer in cache.layers:
        known = _known(layer)
        if (inside and not known) or (aligned and not _plain(cache, layer)):
            kind = "an offloaded cache" if getattr(cache, "offloading", False) else name_of(layer)
            instead = (
                "a DynamicCache or StaticCache"
                if not known
                else "a DynamicCache or StaticCache, or the option that leaves it whole (align_cache=False,"
                " interval=0)"
            )
            doing = "be shortened after prefill" if aligned and known else "hold layers of different lengths"
            raise NotImplementedError(
                f"This strategy needs a KV cache that can {doing}, found {kind}: use {instead}."
            )


def make_logical(
    cache: Cache, ledger: Ledger, num_layers: int, inside: bool = False, aligned: bool = False
) -> None:
    """Let the layers of `cache` count logical tokens, tied to `ledger`; the rest as for `check_cache`."""
    while getattr(cache, "layer_class_to_replicate", None) is not None and len(cache.layers) < num_layers:
        cache.layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
    check_cache(cache, inside, aligned)
    for i, layer in enumerate(cache.layers):
        if not (has_length(layer) or has_state(layer)):
            continue  # it stores nothing, or another layer's keys
        if not hasattr(layer, "ledger"):
            make = logical_layer_class if has_length(layer) else state_layer_class
            layer.__class__ = make(type(layer))  # type: ignore[arg-type]
        layer.ledger, layer.number = ledger, i  # type: ignore[attr-defined]
    lead = counting_layers(cache)[0]
    ledger.states = [layer for layer in cache.layers if has_state(layer)]
    ledger.counter, ledger.lead = lead.number, lead if ledger.states else None
    ledger.gather = all(
        _plain(cache, layer) and not hasattr(layer, "storage") for layer in counting_layers(cache)
    )


def _known(layer: Any) -> bool:
    """Whether a layer is of transformers' own kinds that store keys and values only."""
    return isinstance(layer, (DynamicLayer, StaticLayer)) and not has_state(layer)


def _plain(cache: Cache, layer: Any) -> bool:
    """Whether a layer's keys and values can be gathered."""
    return _known(layer) and not hasattr(layer, "_quantize") and not getattr(cache, "offloading", False)
