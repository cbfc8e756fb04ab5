"""The vision-language model inside what a user holds, and the sentence for what holds none."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from ..streams import unwrapped

LOAD = "one loaded with AutoModelForImageTextToText.from_pretrained(...)"


def model_inside(model: Any, types: Collection[str]) -> Any:
    """The vision-language model in a wrapper of any class (a value head, an embedding head), or the model.

    Wrappers of torch and peft are taken off first. Of another module the outermost submodules count that are
    transformers models of one of the types and encode images themselves.

    Args:
        model: what the user holds.
        types: values of `config.model_type` that an adapter serves.

    Returns:
        That model; without one, or for an object that is no module, the object without its wrappers.

    Raises:
        ValueError: if there are several.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module) or _serves(model, types):
        return model
    found: dict[int, tuple[str, nn.Module]] = {}
    _search(model, "", types, found, set())
    inner = {id(part) for _, m in found.values() for part in m.modules() if part is not m}
    outermost = [each for key, each in found.items() if key not in inner]
    if len(outermost) > 1:
        names = ", ".join(name for name, _ in outermost)
        raise ValueError(
            f"This {type(model).__name__} holds {len(outermost)} vision-language models ({names}): patch them"
            f" one by one, as in vtoken.patch(model.get_submodule({outermost[0][0]!r}), ...)."
        )
    return outermost[0][1] if outermost else model


def _serves(module: Any, types: Collection[str]) -> bool:
    """Whether a module is a transformers model of one of the types that encodes pictures itself."""
    if getattr(getattr(module, "config", None), "model_type", None) not in types:
        return False
    base = getattr(module, "base_model", None)
    return any(hasattr(base, f"get_{modality}_features") for modality in ("image", "video"))


def _search(
    module: nn.Module,
    path: str,
    types: Collection[str],
    found: dict[int, tuple[str, nn.Module]],
    seen: set[int],
) -> None:
    """Enter into `found` the served models below a module, by id, with their paths."""
    for name, child in module.named_children():
        inside, here = unwrapped(child), f"{path}{name}"
        if id(inside) in seen or not isinstance(inside, nn.Module):
            continue
        seen.add(id(inside))
        if _serves(inside, types):
            found[id(inside)] = here, inside
        else:
            _search(inside, f"{here}.", types, found, seen)


def no_model(found: Any) -> TypeError:
    """The error for an object without a vision-language model; it says what would work."""
    kind, head = type(found), "vtoken patches Hugging Face vision-language models, found"
    if isinstance(found, str):
        return TypeError(f"{head} the str {found!r}: load it first and pass the model, {LOAD}.")
    if isinstance(getattr(found, "model", None), nn.Module) and not isinstance(found, nn.Module):
        return TypeError(
            f"{head} {kind.__module__}.{kind.__name__}, which is none but holds one: pass its .model."
        )
    return TypeError(f"{head} {kind.__module__}.{kind.__name__}: pass the model itself, for example {LOAD}.")


def no_pictures(model: Any) -> ValueError | None:
    """The error for a transformers model that reads no pictures, None for one that reads some."""
    told = getattr(model, "input_modalities", "text")
    if {"image", "video"} & set((told,) if isinstance(told, str) else told):
        return None
    base = getattr(model, "base_model", None)
    if any(hasattr(base, f"get_{modality}_features") for modality in ("image", "video")):
        return None
    return ValueError(
        f"{type(model).__name__} (model type {model.config.model_type!r}) reads no images or videos, so that"
        f" it has no visual tokens to drop: pass a vision-language model such as llava, {LOAD}."
    )
