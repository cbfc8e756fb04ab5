"""By default one encoder of those that differ in a detail; the others with `-m product`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.product import mark_product

ALIKE = {
    "timm-layer_scale",
    "timm-registers_outside",
    "timm-cls_avg",
    "timm-cls_avgmax",
    "timm-no_bias",
    "timm-eva_half",
    "timm-eva_qk_norm",
    "open_clip-quick_gelu",
    "open_clip-layer_scale",
    "hf-SiglipVisionModel-eager",
    "hf-ViTModel-eager",
    "hf-DeiTModel-eager",
    "hf-Dinov2Model-eager",
    "hf-Dinov2WithRegistersModel-eager",
}


def _is_product(item: pytest.Item, parameters: dict[str, Any]) -> bool:
    return parameters.get("name") in ALIKE


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_product(items, Path(__file__).parent, _is_product)
