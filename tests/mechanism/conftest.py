"""The mechanism is tried on every kind of language model by default, on every family with `-m product`."""

from __future__ import annotations

import pytest

from tests.models import FAMILIES

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        name = parameters.get("name", parameters.get("family"))
        if "mechanism" in item.path.parts and name in FAMILIES and name not in CORE:
            item.add_marker(pytest.mark.product)
