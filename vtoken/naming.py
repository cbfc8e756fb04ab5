"""Names of strategies in one text, alone or joined, with their options: "visionzip+fastv(layer=3)"."""

from __future__ import annotations

import ast
from typing import Any

from ._json import value_of

MOST = 1000  # characters of a name with its options


def split_outside(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that stand in no parentheses, without spaces around them."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if sign == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def name_of(text: str) -> str:
    """The name in "fastv(layer=3)"."""
    return text.partition("(")[0].strip()


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of "fastv(layer=3)"; values as in Python or JSON, words with or without quotes.

    Raises:
        ValueError: for anything else in the parentheses.
    """
    name, bracket, rest = text.partition("(")
    if not bracket:
        return name.strip(), {}
    source = f"_({rest.strip()}"
    try:
        if len(text) > MOST:
            raise SyntaxError
        call = ast.parse(source, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise SyntaxError
        if call.args or any(k.arg is None for k in call.keywords):
            raise SyntaxError
        given = {str(k.arg): _value(k.value, source) for k in call.keywords}
        if len(given) < len(call.keywords):
            raise SyntaxError
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(
            f"Options of a strategy stand behind its name as in fastv(layer=3), found {text[:80]!r}."
        ) from None
    return name.strip(), given


def _value(node: ast.expr, source: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return value_of(ast.get_source_segment(source, node) or "")
