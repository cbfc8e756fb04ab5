"""Checks of user values by type hints: the value in its hint's type, or one sentence that refuses it."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])

MAY_BE_INFINITE = "may be infinite"
# a number that others are compared with, so that inf has a meaning
Threshold = Annotated[float, MAY_BE_INFINITE]
BITS = 63  # of a whole number, what torch takes

_UNIONS = (Union, types.UnionType)
_LISTS = (tuple, list, Sequence)
_MAPPINGS = (dict, Mapping)


class _Unfit(Exception):
    pass


def fit(name: str, value: Any, hint: Any) -> Any:
    """`value` in the type that `hint` names.

    A whole number is fine for a float, a list for a tuple, a number of NumPy or a tensor of one value and no
    dimension for what it holds; a bool is no number, a number or a word no bool, and nan is never right.
    Hints other than bool, int, float, str, None, Literal, tuple, list, Sequence, dict, Mapping and unions of
    them let everything pass.

    Args:
        name: what the sentence calls the value.

    Raises:
        ValueError: if it does not fit, with what would.
    """
    if not _known(hint):
        return value
    try:
        return _fit(value, hint)
    except _Unfit:
        raise ValueError(f"{name} must be {words(hint)}, found {found(value)}.") from None


def without_folders(argument: str) -> str:
    """An argument of a command line, of an absolute path its last part."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + equals + (os.path.basename(value.rstrip(os.sep)) if os.path.isabs(value) else value)


def fit_field(cls: Any, name: str, value: Any) -> Any:
    """`fit` for a field of a dataclass; its default passes whatever the annotation says."""
    hint, default = _hints_of(cls)[name]
    return value if _same(value, default) else fit(name, value, hint)


def has_field(cls: Any, name: str) -> bool:
    """Whether the dataclass has a field of that name."""
    return name in _hints_of(cls)


def checked(function: F, error: type[ValueError] = ValueError) -> F:
    """Decorator: fit every argument to its annotation before the call, or raise `error`; defaults pass."""
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        space = getattr(sys.modules.get(function.__module__), "__dict__", {})
        return {
            n: _resolve(p.annotation, space)
            for n, p in signature.parameters.items()
            if p.kind not in _VARIABLE
        }

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # raises Python's own sentence
        try:
            for name, value in bound.arguments.items():
                if name in hints() and not _same(value, signature.parameters[name].default):
                    bound.arguments[name] = fit(name, value, hints()[name])
        except ValueError as wrong:
            raise error(str(wrong)) from None
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def number(value: Any) -> Any:
    """Python number of a NumPy number, a 0-d tensor or a subclass of int; anything else unchanged."""
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and getattr(value, "ndim", None) == 0:
        try:
            value = value.item()
        except Exception:  # a tensor without data
            return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return value


def listed(names: Iterable[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def found(value: Any) -> str:
    """`repr` in one line of at most 80 characters, of whatever object."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"one of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def words(hint: Any) -> str:
    """Words for the values that a hint allows: "None or a whole number"."""
    members = _members(hint)
    literals = [a for m in members if get_origin(m) is Literal for a in get_args(m)]
    parts = ["None"] if type(None) in members else []
    if float in members and int in members:
        members = [m for m in members if m is not int]
    parts += [_WORDS[m] for m in members if m in _WORDS]
    parts += [_sequence_words(m) for m in members if _base(m) in (*_LISTS, *_MAPPINGS)]
    parts += [f"one of {', '.join(map(str, literals))}"] if literals else []
    return " or ".join(parts)


_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    Threshold: "a number",
    str: "a string",
}
_PLURALS = {"a whole number": "whole numbers", "a finite number": "finite numbers", "a string": "strings"}


def _sequence_words(hint: Any) -> str:
    inner = [a for a in get_args(hint) if a is not Ellipsis]
    if _base(hint) in _MAPPINGS:
        return "a mapping"
    if not inner or not all(map(_known, inner)):
        return "a list"
    if get_origin(hint) is tuple and Ellipsis not in get_args(hint):
        return f"a list of {len(inner)}: {', '.join(map(words, inner))}"
    return f"a list of {_PLURALS.get(words(inner[0]), f'values, each {words(inner[0])}')}"


# -- hints ---------------------------------------------------------------------------------------------------
@functools.lru_cache(1024)
def _hints_of(cls: Any) -> dict[str, tuple[Any, Any]]:
    """(hint, default) of every field of a dataclass; Any for a hint that cannot be resolved."""
    out: dict[str, tuple[Any, Any]] = {}
    for f in fields(cls):
        owner = next((c for c in cls.__mro__ if f.name in inspect.get_annotations(c)), cls)
        space = getattr(sys.modules.get(owner.__module__), "__dict__", {})
        out[f.name] = _resolve(f.type, space), f.default
    return out


def _resolve(annotation: Any, space: Mapping[str, Any]) -> Any:
    def holder() -> None: ...

    holder.__annotations__ = {"value": annotation}
    try:
        return get_type_hints(holder, dict(space), include_extras=True)["value"]
    except Exception:  # a name that exists for type checkers only, or inside a function
        return Any


def _base(hint: Any) -> Any:
    return get_origin(hint) or hint


def _members(hint: Any) -> list[Any]:
    """The hints of a union, nested ones included; a lone hint is a union of one."""
    if get_origin(hint) in _UNIONS:
        return [m for arg in get_args(hint) for m in _members(arg)]
    if get_origin(hint) is Annotated and hint != Threshold:
        return _members(get_args(hint)[0])
    return [hint]


def _known(hint: Any) -> bool:
    scalars = (bool, int, float, str, type(None), Threshold)
    return all(m in scalars or _base(m) in (Literal, *_LISTS, *_MAPPINGS) for m in _members(hint))


def _same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    return type(value) is type(default) and isinstance(value, float | int | str) and value == default


# -- values --------------------------------------------------------------------------------------------------
def _fit(value: Any, hint: Any) -> Any:
    members = _members(hint)
    if not _known(hint):
        return value
    exact = type(number(value))  # of float | int, a whole number stays one
    for member in sorted(members, key=lambda m: m is not exact):
        try:
            return _fit_one(value, member)
        except _Unfit:
            continue
    raise _Unfit


def _fit_one(value: Any, hint: Any) -> Any:
    kind = _base(hint)
    if hint is type(None):
        return _kept(value, value is None)
    if kind is Literal:
        return _literal(value, get_args(hint))
    if kind in _LISTS:
        return _list(value, kind, get_args(hint))
    if kind in _MAPPINGS:
        key, inner = get_args(hint) or (Any, Any)
        _kept(value, isinstance(value, Mapping))
        return {_fit(k, key): _fit(v, inner) for k, v in value.items()}
    if hint is str:
        return _kept(value, isinstance(value, str))
    plain = number(value)
    if hint is bool:
        return _kept(plain, isinstance(plain, bool))
    if isinstance(plain, bool):
        raise _Unfit
    if hint is int:
        return _kept(plain, isinstance(plain, int) and plain.bit_length() <= BITS)
    return _float(plain, hint == Threshold)


def _kept(value: Any, good: bool) -> Any:
    if not good:
        raise _Unfit
    return value


def _float(value: Any, infinite: bool) -> float:
    try:
        made = float(_kept(value, isinstance(value, numbers.Real)))
    except OverflowError:
        raise _Unfit from None
    return _kept(made, math.isfinite(made) or (infinite and not math.isnan(made)))


def _literal(value: Any, choices: Sequence[Any]) -> Any:
    plain = number(value)
    for choice in choices:
        if (
            isinstance(plain, bool) == isinstance(choice, bool)
            and isinstance(plain, type(choice))
            and plain == choice
        ):
            return choice
    raise _Unfit


def _list(value: Any, kind: Any, hints: tuple[Any, ...]) -> Any:
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and getattr(value, "ndim", None) == 1:
        value = value.tolist()
    _kept(value, isinstance(value, list | tuple | range))
    if kind is tuple and hints and hints[-1] is not Ellipsis:
        _kept(value, len(value) == len(hints))
        made = [_fit(v, h) for v, h in zip(value, hints, strict=True)]
    else:
        made = [_fit(v, hints[0]) for v in value] if hints else list(value)
    return tuple(made) if kind is tuple or (kind is Sequence and not isinstance(value, list)) else made
