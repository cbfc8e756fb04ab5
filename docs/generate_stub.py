"""Writes vtoken/strategies/__init__.pyi, the names that type checkers see: `python docs/generate_stub.py`."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import vtoken.strategies as strategies

PLACE = Path(strategies.__file__).with_suffix(".pyi")


def stub() -> str:
    """The imports of vtoken/strategies/__init__.py, and one for every strategy of the package."""
    tree = ast.parse(Path(strategies.__file__).read_text())
    own = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    lines = [
        f"from .{node.module} import " + ", ".join(f"{a.name} as {a.name}" for a in node.names)
        for node in own
        if not any(a.name.startswith("_") for a in node.names)
    ]
    for name in strategies.list_names():
        cls = strategies.strategy_info(name).cls
        if cls.__module__.startswith("vtoken.strategies."):
            lines.append(
                f"from {cls.__module__.removeprefix('vtoken.strategies')} import {cls.__name__} as"
                f" {cls.__name__}"
            )
    head = f'"""{inspect.getdoc(strategies)}"""\n\n# written by docs/generate_stub.py\n'
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PLACE.write_text(stub())
