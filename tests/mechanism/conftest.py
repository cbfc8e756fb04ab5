"""By default each test of the mechanism runs on a few families and `WIDE` on every kind of language model; on
every family with `-m product`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import FAMILIES
from tests.product import mark_product

# one for each: positions, kinds of layers and caches, masks, arguments per token, features inside the LLM
CORE = {
    "llava",
    "llava_next",
    "llava_next_video/video",
    "internvl",
    "gemma3",
    "idefics3",
    "paligemma",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen2_5_vl/video",
    "qwen3_vl",
    "qwen3_5",
    "qwen3_5/video",
    "lfm2_vl",
    "nemotron_h_omni",
    "llama4",
    "glm4v",
    "cohere2_vision",
    "ernie4_5_vl_moe",
    "gemma3n",
    "gemma4",
    "granite4_vision",
    "molmo2",
    "qwen3_omni_moe_thinker",
}


FEW = {"llava", "gemma3", "qwen2_5_vl/video", "qwen3_vl", "qwen3_5", "lfm2_vl", "llama4", "molmo2"}
WIDE = ("test_greedy", "test_loss_and_gradients", "test_unpatch_restores_everything")


def _is_product(item: pytest.Item, parameters: dict[str, Any]) -> bool:
    name = parameters.get("name", parameters.get("family"))
    tried = CORE if getattr(item, "originalname", None) in WIDE else FEW
    return name in FAMILIES and name not in tried


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_product(items, Path(__file__).parent, _is_product)
