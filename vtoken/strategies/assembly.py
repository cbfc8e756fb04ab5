"""Make one Strategy from a name, a class, an object or a list of them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..checks import found, number
from ..naming import name_of, split_options
from .base import Strategy
from .composition import Composite
from .registry import check_methods, create, parse_strategy, split_names


def options_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Take one strategy's hyper-parameters out of `options`; ValueError if they are no mapping of names."""
    given = options.pop(name, {})
    if not isinstance(given, dict) or not all(isinstance(k, str) for k in given):
        raise ValueError(
            f"Options of {name} are a mapping such as {name}={{'layer': 3}}, found {found(given)}."
        )
    return given


def combine(parts: Sequence[Any], budget: float | int | None = None, **options: Any) -> Composite:
    """Strategies by name or configured, as one.

    Args:
        parts: names or `Strategy` objects.
        budget: shared by all; see `Composite`. Objects that were configured with their own keep it where this
            is None.
        options: `split`, `positions` for all that are named, and per name a mapping of its hyper-parameters,
            such as `fastv={"layer": 3}`.

    Raises:
        TypeError, ValueError: for what is no strategy, unknown options, or parts that do not fit together.
    """
    split, positions = options.pop("split", 0.5), options.pop("positions", None)
    made: list[Strategy] = []
    budgets: dict[str, Any] = {}  # of their own
    for part in split_names(parts):
        if isinstance(part, type) and issubclass(part, Strategy):
            part = part.info.name
        if isinstance(part, Strategy):
            if budget is not None:
                raise ValueError(
                    f"{part.info.name} is configured already: give each strategy its budget, or name them and"
                    " let them share."
                )
            made.append(part)
        elif isinstance(part, str):
            name, own = split_options(part)
            given = options_of(name, options)
            if "budget" in (told := given | own):
                budgets[name] = told["budget"]
            made.append(create(part, **({} if positions is None else {"positions": positions}) | given))
        else:
            raise TypeError(
                f"A combination is made of names and vtoken.strategies objects, found {found(part)}."
            )
    if options:
        raise ValueError(
            f"A combination takes split, positions and one mapping per strategy, found {', '.join(options)}: "
            f"write for example {made[-1].info.name}={{...}}."
        )
    whole = Composite(budget, made, split=split)
    for part in whole.ordered:
        if part.budget != budgets.get(part.info.name, part.budget):
            raise ValueError(
                f"{part.info.name} has a budget of its own, {budgets[part.info.name]}, and a part of"
                f" budget={budget}, which is shared: leave one out."
            )
    return whole


def assemble(strategy: Any, budget: float | int | None, options: dict[str, Any]) -> Strategy:
    """A Strategy from a name, a class, an object or a list of them; TypeError if it has no method to ask."""
    made = _assemble(strategy, budget, options)
    check_methods(type(made))
    return made


def _assemble(strategy: Any, budget: float | int | None, options: dict[str, Any]) -> Strategy:
    if isinstance(strategy, list | tuple) and len(strategy) == 1:
        strategy = strategy[0]
        options = options_of(name_of(strategy), options) | options if isinstance(strategy, str) else options
    if isinstance(strategy, str):
        strategy = parse_strategy(strategy)
    if isinstance(strategy, list | tuple):
        return combine(strategy, budget if budget is not None else options.pop("budget", None), **options)
    if isinstance(strategy, Strategy):
        if budget is not None or options:
            given_names = ", ".join(([] if budget is None else ["budget"]) + list(options))
            raise ValueError(
                f"{type(strategy).__name__} is configured already: set {given_names} when you make it, not in"
                " patch()."
            )
        return strategy
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        strategy = strategy.info.name
    if not isinstance(strategy, str):
        if isinstance(strategy, nn.Module):
            raise TypeError(
                "The second argument is the strategy, found a model: call vtoken.patch(model, 'hired')."
            )
        value = number(strategy)
        budget_of = isinstance(value, numbers.Real) and not isinstance(value, bool)
        raise TypeError(
            "A strategy is a name such as 'hired', a vtoken.strategies object, a list of them or a"
            f" VTokenConfig, found {found(strategy)}{f': write budget={value}' if budget_of else ''}."
        )
    if budget is not None:
        options = options | {"budget": budget}
    return create(strategy, **options)
