"""What a call of `patch` or `applied` asks for: the strategy, and the adapter or encoder of the model."""

from __future__ import annotations

from typing import Any

from .adapters.base import Adapter
from .adapters.registry import adapter_for
from .config import VTokenConfig
from .fit import fitting_encoder, plain_encoder, unmet
from .strategies import Strategy
from .strategies.assembly import assemble
from .strategies.trained import trained_part

DEFAULT = "farcover"  # first by mean rank on the accuracy boards (docs/board.md)


def make_strategy(strategy: Any, budget: float | int | None, options: dict[str, Any]) -> Strategy:
    """A Strategy from a name, a list of names, a strategy object or a VTokenConfig."""
    weights, told = None, None
    if isinstance(strategy, VTokenConfig):
        weights = strategy.weights
        given = strategy.options | ({} if strategy.budget is None else {"budget": strategy.budget})
        if strategy.positions is not None:
            given["positions"] = strategy.positions
        told = trained_part(assemble(strategy.strategy, None, dict(given))) if options else None
        strategy, options = strategy.strategy, given | options
    made = assemble(strategy, budget, options)
    part = trained_part(made)
    if part is not None and weights is not None:
        if told is not None:
            told.check_shared(part)
        part.source = weights
    return made


def requested(
    model: Any,
    strategy: Any,
    budget: float | int | None,
    adapter: str | type[Adapter] | None,
    options: dict[str, Any],
) -> tuple[Strategy, Any]:
    """The strategy, or the default one for this model, and the adapter or encoder that it is for.

    Raises:
        TypeError, ValueError: as `vtoken.patch`, but for a strategy that does not fit.
    """
    made = None if strategy is None else make_strategy(strategy, budget, options)
    target = _target(model, adapter)
    if made is None:
        if not isinstance(target, Adapter):
            raise ValueError(
                f"{type(target.model).__name__} is an encoder without an LLM, for which there is no default"
                f" strategy: name one of {', '.join(fitting_encoder(target))}."
            )
        made = make_strategy(DEFAULT, budget, options)
        if "relevance" not in options and unmet(target, made)[1] == ["question_attention"]:
            made = make_strategy(DEFAULT, budget, {**options, "relevance": 0.0})
    return made, target


def _target(model: Any, adapter: str | type[Adapter] | None) -> Any:
    """The adapter of a vision-language model, or the encoder that the model is."""
    encoder = plain_encoder(model) if adapter is None else None
    return adapter_for(model, adapter) if encoder is None else encoder
