"""By default every family runs one strategy of a kind, the others of the kind with `-m product`."""

from __future__ import annotations

import pytest

ALIKE = {"uniform", "vtc_cls"}  # to an adapter as random and hired


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "adapters" in item.path.parts and ALIKE & {parameters.get("strategy"), parameters.get("method")}:
            item.add_marker(pytest.mark.product)
