"""Give the layers of a KV cache the form in which a strategy of the stage "cache" stores tokens."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer

from ..storage import AnswerEviction, MixedPrecision, Packed, PromptTokens, SinkWindow, Storage
from .cache_crop import name_of
from .evicting_layers import EvictingLayer
from .mixed_precision import MixedLayer
from .packed_cache import PackedLayer
from .prompt import Prompt

# declaration -> class of its cache layers, a subclass of DynamicLayer whose objects have `storage`
LAYER_CLASSES: dict[type[Storage], type[Any]] = {
    Packed: PackedLayer,
    MixedPrecision: MixedLayer,
    SinkWindow: EvictingLayer,
    AnswerEviction: EvictingLayer,
}


def check_storable(cache: Any) -> None:
    """Raise NotImplementedError for a cache whose layers cannot change their form."""
    if getattr(cache, "offloading", False):
        raise NotImplementedError(
            "This strategy stores the KV cache in its own form, found an offloaded cache: use a DynamicCache"
            " that is not offloaded."
        )
    for layer in getattr(cache, "layers", ()):
        if type(layer) is not DynamicLayer and not hasattr(layer, "storage"):
            raise NotImplementedError(
                f"This strategy stores the KV cache in its own form, found {name_of(layer)}: use a"
                " DynamicCache of a model without sliding windows."
            )


def adopt_storage(cache: Any, storage: Storage, num_layers: int) -> None:
    """Give every layer of `cache` the class of `storage`, and make layers that are not there yet.

    Raises:
        NotImplementedError: as `check_storable`.
        ValueError: the cache was filled in another form.
    """
    while getattr(cache, "layer_class_to_replicate", None) is not None and len(cache.layers) < num_layers:
        cache.layers.append(cache.layer_class_to_replicate())
    check_storable(cache)
    for i, layer in enumerate(cache.layers):
        found = getattr(layer, "storage", None)
        if found is None:
            layer.__class__ = LAYER_CLASSES[type(storage)]
            layer.begin(storage, i)
    check_form(cache, storage)


def check_form(cache: Any, storage: Storage) -> None:
    """Raise ValueError for a cache that was filled in another form than `storage`."""
    for layer in cache.layers:
        found = getattr(layer, "storage", None)
        if found != storage:
            raise ValueError(
                f"This KV cache was filled in the form {found or name_of(layer)}, the present strategy has"
                f" {storage}: go on with the strategy that filled it, or start the conversation with a new"
                " cache."
            )


def check_read_at_once(storage: Storage | None, prompt: Prompt | None, tokens: int, cache: Any) -> None:
    """Raise NotImplementedError if a `generate` stores nothing, or packs a prompt while it is read.

    Args:
        tokens: of the prompt, those in the cache included, once the present forward has been read.
    """
    if prompt is None or not isinstance(storage, Packed | MixedPrecision):
        return
    if cache is None:
        raise NotImplementedError(
            "This strategy acts on the KV cache, found use_cache=False: leave it out, or unpatch the model."
        )
    if prompt.length > tokens:
        raise NotImplementedError(
            "A strategy that packs the KV cache reads a prompt at once: leave out prefill_chunk_size."
        )


def hold_back(cache: Any, drafts: bool) -> None:
    """Let packed layers wait while an assistant proposes tokens, which may be taken back."""
    for layer in cache.layers:
        if isinstance(layer, PackedLayer):
            layer.waits = drafts


def announce(cache: Any, tokens: PromptTokens, first: int = 0) -> None:
    """Tell the layers from `first` on what they will be given."""
    for layer in cache.layers[first:]:
        layer.announce(tokens)


def stored_bytes(cache: Any) -> int | None:
    """Bytes of all tensors of a packed cache; None for any other."""
    layers = getattr(cache, "layers", ())
    if not layers or not all(isinstance(layer, PackedLayer) for layer in layers):
        return None
    return sum(layer.stored_bytes() for layer in layers)
