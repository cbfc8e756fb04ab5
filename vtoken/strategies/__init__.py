"""Reduction strategies, one file each. Importing the package registers every one of them."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from typing import Any

from .assembly import combine
from .base import Strategy, top_k
from .composition import Composite
from .info import StrategyInfo
from .merging import EncoderStrategy, ScheduledMerging
from .registry import create, list_names, register, registered, strategy_info
from .scored import ScoredStrategy

__all__ = [
    "Composite",
    "EncoderStrategy",
    "ScheduledMerging",
    "ScoredStrategy",
    "Strategy",
    "StrategyInfo",
    "combine",
    "create",
    "list_names",
    "register",
    "strategy_info",
    "top_k",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

for _cls in registered():
    globals()[_cls.__name__] = _cls
    __all__.append(_cls.__name__)

_RENAMED = {"Stc": "STC", "StcCacher": "STCCacher", "StcPruner": "STCPruner", "TsLlava": "TSLLaVA"}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{name} is called {_RENAMED[name]}: the old name goes in the next release.", DeprecationWarning, 2
    )
    return globals()[_RENAMED[name]]
