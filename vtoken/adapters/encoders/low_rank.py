"""LoRA that peft puts around torch's `MultiheadAttention`, read as the weights that it makes.

peft writes them into the weights while the attention's own forward runs; a layer in halves does not call it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def _wrappers(attention: Any) -> Iterator[Any]:
    """The wrappers around an attention, the outermost first."""
    while "base_layer" in getattr(attention, "_modules", {}):
        yield attention
        attention = attention.base_layer


def base_of(attention: Any) -> Any:
    """The attention inside its wrappers."""
    for wrapper in _wrappers(attention):
        attention = wrapper.base_layer
    return attention


def unreadable(attention: Any) -> str | None:
    """The kind of a wrapper that is no low-rank update of the packed projection; None if there is none."""
    for wrapper in _wrappers(attention):
        lora = hasattr(wrapper, "lora_A") and hasattr(wrapper, "get_delta_weight")
        if not lora or getattr(wrapper, "parameter_name", "in_proj_weight") != "in_proj_weight":
            return type(wrapper).__name__
    return None


def packed_weight(attention: Any) -> Tensor:
    """(3 C, C), the projection to queries, keys and values with the active updates.

    Raises:
        ValueError: if something else than low-rank updates is around the attention.
    """
    if kind := unreadable(attention):
        raise ValueError(
            f"The attention is wrapped in {kind}, which vtoken cannot read: use LoRA, or merge it into the"
            " weights first."
        )
    weight: Tensor = base_of(attention).in_proj_weight
    for wrapper in _wrappers(attention):
        if wrapper.disable_adapters:
            if wrapper.merged:
                raise ValueError(
                    "LoRA is disabled, and its weights are merged: unmerge it (peft's unmerge_adapter) first."
                )
        elif not wrapper.merged:
            for name in wrapper.active_adapters:
                if name in wrapper.lora_A:
                    weight = weight + wrapper.get_delta_weight(name).to(weight)
    return weight
