"""By default every family runs one strategy of a kind, the others of the kind with `-m product`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.product import mark_product

ALIKE = {"uniform", "vtc_cls"}  # to an adapter as random and hired


def _is_product(item: pytest.Item, parameters: dict[str, Any]) -> bool:
    return bool(ALIKE & {parameters.get("strategy"), parameters.get("method")})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_product(items, Path(__file__).parent, _is_product)
