"""vtoken in vLLM: models that read fewer visual tokens, as a plugin of vLLM's group `vllm.general_plugins`.

An installed plugin changes nothing. A model is served with a strategy if it is asked for by overrides of its
configuration:

    vllm.LLM(model, **vtoken.integrations.vllm.overrides(model, "hired", budget=0.2))
"""

from __future__ import annotations

import copy
from typing import Any

from ...config import VTokenConfig
from ...extras import require

PREFIX = "VToken"
MODELS = {  # config.model_type, the name of the family's file: vLLM's architecture
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


def register() -> None:
    """Make vtoken's architectures known to vLLM, which calls this in each of its processes.

    Their modules are imported when a model is loaded.

    Raises:
        ImportError: without vLLM.
    """
    require("vllm", extra="vllm")
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for family, architecture in MODELS.items():
        if PREFIX + architecture not in known:
            path = f"{__name__}.families.{family}:{PREFIX}{architecture}"
            ModelRegistry.register_model(PREFIX + architecture, path)


def overrides(model: Any, strategy: Any, budget: float | int | None = None, **options: Any) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that serve a model with a strategy: `{"hf_overrides": {...}}`, JSON values.

    Args:
        model: name or folder of the model, as for `transformers.AutoConfig`, or its configuration.
        strategy: as for `vtoken.patch`: a registered name or a `VTokenConfig`.
        budget: share of the visual tokens in (0, 1], or a whole number of tokens per image or frame; the
            strategy's default if None. A request can bring its own as `vtoken_budget`, among its
            `mm_processor_kwargs`.
        options: further hyper-parameters of the strategy.

    Raises:
        ValueError: for a model or a strategy that cannot be served, a value of a wrong type or out of range.
    """
    from .reduction import Reduction

    config = model if hasattr(model, "model_type") else _load_config(model)
    if config.model_type not in MODELS:
        raise ValueError(
            f"vtoken serves {', '.join(MODELS)} in vLLM, found {config.model_type}: use vtoken.patch on the"
            " transformers model."
        )
    told = _settings(strategy, budget, options)
    wanted = copy.deepcopy(config)
    wanted.vtoken = told
    reduction = Reduction(wanted)  # refuses what cannot be served
    chosen: dict[str, Any] = {"architectures": [PREFIX + MODELS[config.model_type]], "vtoken": told}
    if reduction.strategy.positions == "original" and not uses_mrope(config):
        # Told at the top of the configuration only: vLLM's runner then asks the model for positions, and the
        # LLM, built from text_config, still turns by one row of them.
        chosen["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 1]}
    elif getattr(config, "rope_parameters", None) and not uses_mrope(config):
        chosen["rope_parameters"] = None  # written into the model's file by overrides with original positions
    return {"hf_overrides": chosen}


def uses_mrope(config: Any) -> bool:
    """Whether the LLM of a configuration has multimodal rope, positions of three rows."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return "mrope_section" in rope


def known_positions(model_config: Any) -> int:
    """Positions that the LLM knows; where rope is scaled, vLLM admits more than the model's file says."""
    own = model_config.hf_config.get_text_config().max_position_embeddings
    return int(max(own, model_config.max_model_len))


def _load_config(model: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)


def _settings(strategy: Any, budget: float | int | None, options: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(strategy, VTokenConfig):
        positions = options.pop("positions", None)
        strategy = VTokenConfig(strategy, budget, positions, options)
    elif budget is not None or options:
        raise ValueError("A VTokenConfig brings its budget and options along: give them there.")
    told = strategy.to_dict()
    # a budget of None stays: one that is missing would be read as VTokenConfig's default
    return {key: value for key, value in told.items() if key == "budget" or value not in (None, {})}
