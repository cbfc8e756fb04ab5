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
    """What is around an attention and no LoRA on its packed projection, in words; None if nothing else is.

    LoRA of the output projection is refused: peft adds it twice when it writes it into the weights (0.21).
    """
    for wrapper in _wrappers(attention):
        lora = hasattr(wrapper, "lora_A") and hasattr(wrapper, "get_delta_weight")
        if not lora or getattr(wrapper, "parameter_name", "in_proj_weight") != "in_proj_weight":
            return f"{type(wrapper).__name__} around its attention"
    out = getattr(base_of(attention), "out_proj", None)
    return (
        None if next(_wrappers(out), None) is None else f"{type(out).__name__} around its output projection"
    )


READABLE = (
    "only LoRA with target_parameters=['attn.in_proj_weight'] can be read: use that, or merge_and_unload"
)


def packed_weight(attention: Any) -> Tensor:
    """(3 C, C), the projection to queries, keys and values with the active updates.

    Raises:
        ValueError: if something else than low-rank updates is around the attention.
    """
    if found := unreadable(attention):
        raise ValueError(f"A patched layer has {found}, and {READABLE} it first.")
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
