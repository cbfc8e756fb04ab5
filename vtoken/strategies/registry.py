"""Names to strategies: registration, look-up with near names, listing by pattern."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any, TypeVar

from ..checks import fit, found
from ..naming import name_of, split_options, split_outside
from ..plugins import Plugins, same_package
from .base import Strategy
from .info import BudgetMeans, Stage, StrategyInfo

S = TypeVar("S", bound=type[Strategy])

# what a budget counts where a method acts at one place that leaves no choice
MEANS: dict[tuple[str, ...], BudgetMeans] = {("projector",): "entrance", ("encoder",): "tower"}
_registry: dict[str, StrategyInfo] = {}


def register(name: str, **metadata: Any) -> Callable[[S], S]:
    """Class decorator: register a `Strategy` dataclass under `name`.

    Args:
        name: a lower-case identifier.
        metadata: fields of `StrategyInfo`; `summary` and `stages` are required.

    Raises:
        ValueError: if the name is taken or malformed, or the metadata is incomplete.
        TypeError: if the class is no `Strategy` dataclass, or has no method that does something.
    """

    def add(cls: S) -> S:
        if not (isinstance(cls, type) and issubclass(cls, Strategy) and is_dataclass(cls)):
            raise TypeError(
                f"@register({name!r}) needs a dataclass that derives from vtoken.Strategy, found {cls!r}."
            )
        check_methods(cls)
        if not name.isidentifier() or name != name.lower():
            raise ValueError(f"A strategy's name must be a lower-case identifier, found {name!r}.")
        known = _registry.get(name)
        if known is not None and (known.cls.__module__, known.cls.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(
                f"The strategy name {name!r} is taken by {known.cls.__module__}.{known.cls.__qualname__}."
            )
        info = StrategyInfo(name=name, cls=cls, **metadata)
        stages = fit(f"stages of {name!r}", info.stages, tuple[Stage, ...])
        if not stages:
            raise ValueError(f"stages of {name!r} must name one at least, found {info.stages!r}.")
        means = fit(f"budget_means of {name!r}", info.budget_means, BudgetMeans | None) or MEANS.get(stages)
        cls.info = _registry[name] = replace(info, stages=stages, budget_means=means)
        return cls

    return add


def _adopt(entry: EntryPoint, loaded: Any) -> None:
    """Raise ValueError unless the entry's package registered a strategy; remove one that cannot be made."""
    mine = [n for n, i in _registry.items() if i.cls is loaded or same_package(i.cls, entry)]
    if not mine:
        raise ValueError(
            f"it registers no strategy, found {found(loaded)}: decorate a class with @vtoken.register(...)"
        )
    for name in mine:
        try:
            made = _registry[name].cls()
            made.needs(None), made.acts_inside
        except Exception as error:
            del _registry[name]
            raise ValueError(
                f"{name}() of its defaults fails with {type(error).__name__}: {error}"
            ) from error


plugins = Plugins("vtoken.strategies", _adopt)


def strategy_info(name: str) -> StrategyInfo:
    """Metadata of one strategy, named with or without options: "fastv", "fastv(layer=3)".

    Raises:
        TypeError: for what is no text.
        ValueError: if there is none of that name, with near names.
    """
    if not isinstance(name, str):
        raise TypeError(f"A strategy is named by a string, found {type(name).__name__}.")
    name = name_of(name)
    if name not in _registry:
        plugins.load()
    if name not in _registry:
        if name in plugins.faults:
            raise ValueError(plugins.faults[name])
        if "," in name:
            raise ValueError(
                f"One strategy is asked for here, found {name!r}: two that work together are joined by +, as"
                " in 'visionzip+fastv'."
            )
        near = difflib.get_close_matches(name.lower().replace("-", "_"), _registry, n=3, cutoff=0.5)
        if near:
            raise ValueError(f"Unknown strategy {name!r}: did you mean {' or '.join(near)}?")
        raise ValueError(
            f"Unknown strategy {name!r}: there are {', '.join(sorted(_registry))}, and what this program or"
            " an installed plugin registers."
        )
    return _registry[name]


def modalities_of(name: str) -> tuple[str, ...]:
    """The modalities that a strategy is defined for: "image", "video" or both."""
    return strategy_info(name).cls().needs(None).modalities


def is_baseline(text: str) -> bool:
    """Whether a strategy, named alone, exists to be compared with."""
    names = parse_strategy(text)
    return isinstance(names, str) and strategy_info(names).baseline


def parse_strategy(text: str) -> str | list[str]:
    """A registered name, or the list of several that are joined by "+", each with its options if it has some.

    Raises:
        TypeError: for what is no text.
        ValueError: for a name that is not registered, or for options that cannot be read.
    """
    if not isinstance(text, str):
        raise TypeError(f"A strategy is named by a string, found {found(text)}.")
    names = split_outside(text, "+")
    if len(names) > 1 and not all(names):
        raise ValueError(f'Names of strategies are joined as in "visionzip+fastv", found {found(text)}.')
    for name in names:
        strategy_info(name)
        split_options(name)
    return names if len(names) > 1 else names[0]


def split_names(parts: Iterable[Any]) -> list[Any]:
    """Parts of a combination, with every "a+b" among them as two names."""
    out: list[Any] = []
    for part in parts:
        names = parse_strategy(part) if isinstance(part, str) else part
        out += names if isinstance(names, list) else [names]
    return out


def create(name: str, **options: Any) -> Strategy:
    """Make the strategy `name` with the given hyper-parameters, in addition to those that the name has.

    Raises:
        ValueError: for hyper-parameters that it does not have, or that are given twice.
    """
    cls = strategy_info(name).cls
    name, own = split_options(name)
    if twice := sorted(own.keys() & options.keys()):
        raise ValueError(
            f"{name} is given {twice[0]} twice, {own[twice[0]]!r} and {options[twice[0]]!r}: leave one out."
        )
    options = own | options
    known = [f.name for f in fields(cls) if f.init]
    unknown = [o for o in options if o not in known]
    if unknown:
        bare = "__dataclass_fields__" not in vars(cls) and set(unknown) & set(inspect.get_annotations(cls))
        why = f"; write @dataclass above {cls.__name__} to make its fields options" if bare else ""
        raise ValueError(
            f"{name} has no option {', '.join(map(repr, unknown))}: it takes {', '.join(known)}{why}."
        )
    return cls(**options)


def registered() -> list[type[Strategy]]:
    """The classes that are known so far, by name; other packages are not asked."""
    return [_registry[name].cls for name in sorted(_registry)]


def list_names(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern, in alphabetical order, those of other packages included."""
    plugins.load()
    return sorted(fnmatch.filter(_registry, pattern))


# what is asked, and where
METHODS = {"select_in_prefill": "prefill_layers", "merge_in_encoder": "encoder_layers", "attend": "attention"}


def check_methods(cls: type[Strategy]) -> None:
    """Raise TypeError with one sentence if a class has no method that a patch would ever ask."""
    written = {
        name for name in ("select", "reuse", "storage", *METHODS, *METHODS.values()) if _writes(cls, name)
    }
    if not written & {"select", "reuse", "storage", *METHODS}:
        raise TypeError(
            f"{cls.__name__} would drop nothing: it writes none of select, select_in_prefill,"
            " merge_in_encoder, attend, reuse and storage."
        )
    for method, layers in METHODS.items():
        if (method in written) != (layers in written):
            there, lacking = (method, layers) if method in written else (layers, method)
            raise TypeError(
                f"{cls.__name__} writes {there} without {lacking}, so that it would never be asked: write"
                " both."
            )


def _writes(cls: type[Strategy], name: str) -> bool:
    return getattr(cls, name) is not getattr(Strategy, name)
