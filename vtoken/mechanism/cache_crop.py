"""Crop a shortened KV cache: every layer loses the slots of the logical tokens that go."""

from __future__ import annotations

from typing import Any

from .cache_alignment import cut_layers
from .ledger import Crop, Ledger


def begin_crop(layer: Any, tokens: int) -> Crop | None:
    """The cuts that remove the last `tokens` logical tokens; None if every layer stores one slot for each.

    The first layer of the cache cuts the tables and the other layers use its result, as each of them stores
    another part of the removed tokens.

    Raises:
        NotImplementedError: if a layer's state cannot be cropped.
    """
    ledger: Ledger = layer.ledger
    if layer.number != min([ledger.counter, *(state.number for state in ledger.states)]):
        return ledger.crop
    lead = layer if ledger.lead is None else ledger.lead
    length = max(0, physical_length(lead) + lead.dropped - tokens)
    if ledger.evicted and length < ledger.end:
        raise NotImplementedError(
            "A KV cache that has lost tokens to make room cannot be cropped to before it lost them: keep a"
            " copy of the cache as it was, or start with a new cache."
        )
    cuts = ledger.cuts(length) if length < ledger.end else []
    for state in ledger.states:
        check_rolls_back(state)
        if not all(cut.first for cut in cuts):
            raise NotImplementedError(
                f"A KV cache of {name_of(state)} cannot be cropped into a prompt whose rows lost different"
                " numbers of tokens: crop less, or start with a new cache."
            )
    gone = physical_length(lead) - cuts[0].index.shape[1] if cuts else tokens
    ledger.crop = Crop(length, cuts, gone) if cuts else None
    return ledger.crop


def check_rolls_back(layer: Any) -> None:
    """Raise NotImplementedError if a layer's state cannot be cropped."""
    if not layer.record_past or any(layer.is_recurrent_states_initialized.values()):
        raise NotImplementedError(
            f"The state of a {name_of(layer)} cannot be cropped: keep a copy of the KV cache as it was before"
            " these tokens, or start with a new cache."
        )


def crop_layer(layer: Any, tokens: int, crop_slots: Any) -> None:
    """Remove the last `tokens` logical tokens of a layer; `crop_slots` is the crop of its own class."""
    ledger: Ledger = layer.ledger
    crop = begin_crop(layer, tokens)
    if crop is None:  # tokens that every layer stores, one slot each
        _check_window(layer, tokens)
        layer.physically(crop_slots, -tokens)
        _cut_places(layer, ledger)
        return
    cut, stored = crop.cuts[ledger.table(layer.number)], physical_length(layer)
    if layer.number in crop.done or crop.length != max(0, stored + layer.dropped - tokens):
        raise NotImplementedError(
            "One layer of a shortened KV cache cannot be cropped alone: use cache.crop."
        )
    if not (ledger.gather or all(c.first for c in crop.cuts)):
        raise NotImplementedError(
            f"A KV cache of {name_of(layer)} cannot be cropped into a prompt whose rows lost different"
            " numbers of tokens: crop less, or use a DynamicCache or StaticCache that is not offloaded."
        )
    gone = stored - cut.index.shape[1]
    _check_window(layer, gone, whole=not cut.first)
    if layer.number == ledger.counter:
        ledger.forget(crop.length, crop.cuts)
    if not cut.first:
        cut_layers([layer], cut.index.to(layer.keys.device))
    elif gone:
        layer.physically(crop_slots, -gone)
    crop.done.add(layer.number)
    _cut_places(layer, ledger)
    settle(layer, ledger)


def _cut_places(layer: Any, ledger: Ledger) -> None:
    if ledger.places is not None and layer.number == ledger.counter:
        ledger.places = ledger.places[:, :, : physical_length(layer)]


def _check_window(layer: Any, gone: int, whole: bool = False) -> None:
    """Raise NotImplementedError if a sliding layer lacks tokens that it needs once `gone` slots are cropped.

    With `whole`, it needs every slot that it ever stored.
    """
    if not layer.is_sliding:
        return
    stored = physical_length(layer)
    window = layer.max_cache_len if layer.is_compileable else layer.sliding_window
    held = min(stored, window) if layer.is_compileable else layer.keys.shape[-2]
    if held < stored and (whole or layer.is_compileable or held - gone < min(window - 1, stored - gone)):
        raise NotImplementedError(
            f"A sliding-window layer has lost tokens that it needs after a crop (window {window}): start with"
            " a new cache."
        )


def settle(layer: Any, ledger: Ledger) -> None:
    """Set a layer's counts from the tables."""
    table = ledger.table(layer.number)
    layer.dropped = ledger.dropped[table]
    layer.after_stage = (ledger.dropped[table] - ledger.dropped[0], ledger.dropped[0]) if table else None


def physical_length(layer: Any) -> int:
    """Number of tokens that a cache layer stores."""
    return int(layer.physical_length() if hasattr(layer, "physical_length") else layer.get_seq_length())


def name_of(layer: Any) -> str:
    """The name of a cache layer's original class."""
    return type(layer).__name__.removeprefix("Logical")
