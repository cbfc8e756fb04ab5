"""The names inside vLLM that vtoken relies on, checked when one of its models is loaded."""

from __future__ import annotations

import inspect
from typing import Any

Methods = dict[str, tuple[str, ...]]
WANTED = ">=0.32,<0.34"
PROCESSOR: Methods = {
    "apply": ("inputs", "timing_ctx"),
    "_apply_hf_processor_main": ("mm_items", "hf_kwargs"),
    "_get_mm_hashes": ("inputs",),
    "_maybe_apply_prompt_updates": ("mm_items", "mm_res"),
    "_get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
    "_get_prompt_updates": ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
}
MODEL: Methods = {
    "embed_multimodal": ("kwargs",),
    "embed_input_ids": ("input_ids", "multimodal_embeddings", "is_multimodal"),
}
POSITIONS: Methods = {"get_mrope_input_positions": ("input_tokens", "mm_features")}


def check_names() -> None:
    """Raise ImportError, in one sentence, if this vLLM works in another way than those that were tested."""
    import vllm
    from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
    from vllm.multimodal.processing.processor import BaseMultiModalProcessor

    places: tuple[tuple[Any, Methods], ...] = (
        (BaseMultiModalProcessor, PROCESSOR),
        (SupportsMultiModal, MODEL),
        (SupportsMRoPE, POSITIONS),
    )
    for owner, methods in places:
        for name, parameters in methods.items():
            if (found := lacking(owner, name, parameters)) is not None:
                raise ImportError(
                    f"vtoken works with vllm{WANTED}; in the installed {vllm.__version__}"
                    f" {owner.__name__}.{name} {found}: install another release of vLLM or of vtoken."
                )


def lacking(owner: Any, name: str, parameters: tuple[str, ...]) -> str | None:
    """What is missing of a method, in words; None if it is as expected."""
    method = getattr(owner, name, None)
    if method is None:
        return "is missing"
    have = inspect.signature(method).parameters
    if left := [p for p in parameters if p not in have]:
        return f"has no argument {' and '.join(left)}"
    return None
