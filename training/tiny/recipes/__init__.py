"""Recipes, one file per tiny model, imported on demand.

A recipe has

- ``build() -> (model, processor)``: the untrained model, of the real classes;
- ``train(model, processor, log, seed, **limits)``: all stages, in place, through
  `training.tiny.loop.optimise`; ``limits`` are its keywords ``seconds``, ``workers``, ``keep`` and (for
  tests) ``steps`` and ``checks`` of each stage;
- ``measure(model, processor, questions) -> dict``: further figures of its report in addition to the accuracy;
- ``card(report, log) -> str``: its model card in Markdown.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """The recipes in this folder, sorted; importing none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def recipe(name: str) -> ModuleType:
    """The recipe ``name``.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in names():
        raise ValueError(f"unknown tiny model {name!r}: the recipes are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
