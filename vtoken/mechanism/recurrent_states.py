"""Cache layers without a length: states of linear attention, state space models and short convolutions.

Such a layer stores a state of fixed size instead of one slot per token. The layers with a length count the
tokens of a hybrid cache; a layer with a state follows their ledger, so that a model without a patch does not
change it and a crop that it cannot do is refused before another layer is cropped.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache

from .cache_crop import begin_crop
from .ledger import Ledger

UNOWNED = (
    "This KV cache holds a prompt that vtoken shortened, and the model that goes on with it is not patched:"
    " patch it with the strategy that filled the cache, or start with a new cache."
)
SPOILED = (
    "This KV cache holds recurrent states that a model without a patch has begun to change: start with a new"
    " cache."
)


def has_length(layer: Any) -> bool:
    """Whether a cache layer stores one slot per token. Others store a state of fixed size, or nothing."""
    return hasattr(layer, "get_seq_length")


def has_state(layer: Any) -> bool:
    """Whether a cache layer stores a state of fixed size, alone or in addition to its slots."""
    return hasattr(layer, "update_conv_state")


def counting_layers(cache: Cache | None) -> list[Any]:
    """The layers of a cache that have a length, in order."""
    return [layer for layer in getattr(cache, "layers", ()) if has_length(layer)]


def layers_of_fixed_length(config: Any) -> list[str]:
    """Class names of the cache layers for an LLM that cannot hold fewer tokens than another layer.

    They have a state, store nothing (a block without attention), or read the keys of another layer.
    """
    layers = DynamicCache(config=config).layers
    return sorted({type(layer).__name__ for layer in layers if not has_length(layer) or has_state(layer)})


def check_announced(ledger: Ledger | None) -> None:
    """Raise RuntimeError if no patched model announced that it reads this shortened cache."""
    if ledger is not None and not ledger.announced and ledger.shortened:
        ledger.spoiled = bool(ledger.states)
        raise RuntimeError(UNOWNED)


def check_filler(ledger: Ledger, valid: Tensor) -> None:
    """Raise NotImplementedError if states would read filler after tokens; `valid` (B, m) bool of a forward.

    Attention masks filler anywhere; a state passes it unharmed before a row's first token only.
    """
    read = (ledger.slots[0] >= 0).any(1)
    if ledger.states and bool((~valid.all(1) & read).any()):
        raise NotImplementedError(
            "A row lost more tokens than another, or all, in a later part of the prompt, and recurrent layers"
            " would read filler between its tokens: leave out prefill_chunk_size, and give each conversation"
            " with later images a batch of its own."
        )


@functools.cache
def state_layer_class(cls: type) -> Any:
    """A subclass of `cls`, a cache layer without a length, that follows the ledger of the other layers."""

    class Logical(cls):  # type: ignore[misc, valid-type]
        _layer_type = None
        ledger: Ledger | None = None
        number = 0

        def __reduce__(self) -> Any:
            return _empty_layer, (cls,), self.__dict__

        def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
            check_announced(self.ledger)
            return super().update_conv_state(*args, **kwargs)

        def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
            check_announced(self.ledger)
            return super().update_recurrent_state(*args, **kwargs)

        def crop(self, tokens_to_remove: int) -> Any:
            if self.ledger is not None and tokens_to_remove < 0:
                crop = begin_crop(self, -tokens_to_remove)
                tokens_to_remove = tokens_to_remove if crop is None else -crop.gone
            return super().crop(tokens_to_remove)

        def reset(self) -> None:
            self.ledger = None
            super().reset()

    Logical.__name__ = Logical.__qualname__ = "Logical" + cls.__name__
    Logical.__module__ = __name__
    return Logical


def _empty_layer(cls: type) -> Any:
    """A stateless layer of the logical class of `cls`, for copies and pickles."""
    logical = state_layer_class(cls)
    return logical.__new__(logical)
