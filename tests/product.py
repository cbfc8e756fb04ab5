"""Which rows of a folder's tests run by default, and which with `-m product` alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def mark_product(
    items: list[pytest.Item], folder: Path, is_product: Callable[[pytest.Item, dict[str, Any]], bool]
) -> None:
    """Mark the tests in a folder for which `is_product(item, its parameters)` holds."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if folder in item.path.parents and is_product(item, parameters):
            item.add_marker(pytest.mark.product)
