"""Give the layers of a KV cache the form in which a strategy of the stage "cache" stores tokens."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer

from ..storage import PromptTokens, Storage
from .cache_crop import name_of

# declaration -> class of its cache layers, a subclass of DynamicLayer whose objects have `storage`
LAYER_CLASSES: dict[type[Storage], type[Any]] = {}


def check_storable(cache: Any) -> None:
    """Raise NotImplementedError for a cache whose layers cannot change their form."""
    if getattr(cache, "offloading", False):
        raise NotImplementedError(
            "This strategy stores the KV cache in its own form, found an offloaded cache."
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
        elif found != storage:
            raise ValueError(
                f"This KV cache was filled in the form {found}, the present strategy has {storage}: go on"
                " with the strategy that filled it, or start the conversation with a new cache."
            )


def announce(cache: Any, tokens: PromptTokens) -> None:
    """Tell the layers what they will be given."""
    for layer in cache.layers:
        layer.announce(tokens)
