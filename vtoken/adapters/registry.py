"""Registry of adapters by model type; every module of this folder may register one."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import EntryPoint
from typing import Any

from torch import nn

from ..checks import listed
from ..plugins import Plugins, same_package
from .base import Adapter, language_model_of
from .generic import GenericAdapter, token_id
from .refused import REASONS, language_model_reason, reason
from .wrapped import model_inside, no_model, no_pictures

_adapters: dict[str, type[Adapter]] = {}
_discovered = False


def register_adapter(cls: type[Adapter]) -> type[Adapter]:
    """Class decorator: serve `cls.model_types` with this adapter. Raises ValueError for a type in use."""
    if not cls.model_types:
        raise ValueError(f"{cls.__name__} must name its model_types.")
    for model_type in cls.model_types:
        known = _adapters.get(model_type)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"The model type {model_type!r} is served by {known.__name__} already.")
        _adapters[model_type] = cls
    return cls


def _adopt(entry: EntryPoint, loaded: Any) -> None:
    """Raise ValueError unless another package registered an adapter."""
    if not any(cls is loaded or same_package(cls, entry) for cls in _adapters.values()):
        raise ValueError(
            f"it registers no adapter, found {loaded!r}: decorate a class with @register_adapter"
        )


plugins = Plugins("vtoken.adapters", _adopt)


def list_families() -> list[str]:
    """Model types that can be patched, those that other packages serve included."""
    _discover()
    plugins.load()
    return sorted(_adapters)


def adapter_class(model_type: str) -> type[Adapter]:
    """The adapter of a model type in `list_families()`. Raises KeyError for another one."""
    _discover()
    return _adapters[model_type]


def model_of(model: Any) -> Any:
    """The vision-language model in what a user holds, see `model_inside`; the object itself without one.

    Raises:
        ValueError: if it holds several.
    """
    _discover()
    inside = model_inside(model, _adapters)
    if getattr(getattr(inside, "config", None), "model_type", None) not in _adapters:
        inside = model_inside(model, list_families())  # those of other packages are loaded if needed
    return inside


def adapter_for(model: Any, adapter: str | type[Adapter] | None = None) -> Adapter:
    """The adapter of a model, or of the model inside a wrapper of torch, of peft or of any other class.

    Args:
        adapter: None for the one of the model's type, "generic", or a subclass of `Adapter`.

    Raises:
        TypeError: for an object that is not a transformers model, or an adapter that is none.
        ValueError: if no adapter serves its type, it reads no pictures, or it holds several models.
    """
    _discover()
    chosen = None if adapter is None else _chosen(adapter)
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "nn.DataParallel runs copies of the model, which read the vision tower of the original: use "
            "DistributedDataParallel, or one GPU."
        )
    given, model = model, model_of(model)
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None or not hasattr(model, "base_model"):
        raise no_model(given)
    if model_type not in _adapters:
        plugins.load()
    if model_type not in _adapters and chosen in (None, GenericAdapter):
        _check_unserved(model, chosen is None)
    made = (chosen or _adapters[model_type])(model)
    if (why := language_model_reason(made.decoder)) is not None:
        raise ValueError(why)
    return made


def _check_unserved(model: Any, offer: bool) -> None:
    """Raise ValueError for a model of a type without adapter if the generic one cannot, or may not, serve it.

    Args:
        offer: whether the user has not asked for the generic adapter.
    """
    refusal, kind = no_pictures(model), model.config.model_type
    if refusal is not None:
        raise refusal
    why = reason(model) or language_model_reason(language_model_of(model))
    if why is not None:
        raise ValueError(why)
    lacking = GenericAdapter.missing(model)
    if lacking:
        raise ValueError(
            f"vtoken has no adapter for model type {kind!r}, and the generic one needs {listed(lacking)},"
            " which this model does not have: docs/adding-a-model.md shows how to write an adapter."
        )
    if offer:
        raise ValueError(
            f'vtoken has no adapter for model type {kind!r}: pass adapter="generic", which serves the'
            " strategies that read neither the vision tower nor places in the picture, or write one as"
            " docs/adding-a-model.md shows; docs/families.md names those that ship."
        )


def reads_visual_tokens(model: Any) -> bool:
    """Whether pictures reach a language model of this model, also if no adapter serves its type."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind in list_families() or kind in REASONS:
        return True
    if token_id(config, "image") is None or not hasattr(model, "base_model"):
        return False
    answers = getattr(config, "is_encoder_decoder", False) or model.can_generate()
    return bool(answers) or not GenericAdapter.missing(model)


def _chosen(adapter: str | type[Adapter]) -> type[Adapter]:
    """The class that a user asked for. Raises TypeError or ValueError if it is none."""
    if isinstance(adapter, type) and issubclass(adapter, Adapter):
        return adapter
    if isinstance(adapter, Adapter):
        raise TypeError(
            f"adapter must be a class: pass {type(adapter).__name__} itself, not an object of it."
        )
    if adapter == "generic":
        return GenericAdapter
    error = ValueError if isinstance(adapter, str) else TypeError
    raise error(f'adapter must be "generic" or an Adapter class, found {adapter!r}.')


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    package = importlib.import_module(__package__ or "vtoken.adapters")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg:
            importlib.import_module(f"{__package__}.{module.name}")
    _discovered = True
