"""lmms-eval models with a patch, named `vtoken_...`, such as `lmms-eval --model vtoken_llava_hf`.

Example: `lmms-eval --model vtoken_llava_hf --model_args pretrained=...,vtoken_strategy=hired`.

`manifests` is the entry point of the group `lmms_eval.models`; the classes are made from lmms-eval's own when
one is asked for, so that this module imports nothing of lmms-eval and none of its models before that.
"""

from __future__ import annotations

from typing import Any

from .patched import PREFIX, patch_counted, split

# lmms-eval's names of models whose `.model` is a transformers model that vtoken has an adapter for
BASES = (
    "gemma3",
    "huggingface",
    "internvl_hf",
    "llava_hf",
    "mistral3_vl",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "video_llava",
)
KINDS = ("simple", "chat")


def manifests() -> list[Any]:
    """One `ModelManifest` per entry of `BASES`, of the kinds (simple, chat) that lmms-eval has it in."""
    from lmms_eval import models
    from lmms_eval.models.registry_v2 import ModelManifest

    known = dict(zip(KINDS, (models.AVAILABLE_SIMPLE_MODELS, models.AVAILABLE_CHAT_TEMPLATE_MODELS)))
    out = []
    for base in BASES:
        paths = {f"{kind}_class_path": f"{__name__}.{kind}_{base}" for kind in KINDS if base in known[kind]}
        if paths:
            out.append(ModelManifest(model_id=PREFIX + base, **paths))
    return out


def patched_class(base: type) -> type:
    """A subclass of an lmms-eval model that takes `vtoken_...` arguments, patches, and counts calls."""

    class Patched(base):  # type: ignore[misc, valid-type]
        def __init__(self, **arguments: Any) -> None:
            ours, theirs = split(arguments)
            super().__init__(**theirs)
            self.vtoken_calls = patch_counted(self.model, ours)

        def generate_until(self, requests: list[Any]) -> list[Any]:
            from lmms_eval.models.model_utils.gen_metrics import log_metrics

            out = super().generate_until(requests)
            print(self.vtoken_calls, flush=True)
            log_metrics(0.0, 0, 0.0, self.vtoken_calls.per_call())  # into "throughput" of the results file
            return out

    Patched.__name__ = Patched.__qualname__ = f"VToken{base.__name__}"
    return Patched


def __getattr__(name: str) -> type:
    """The class that a manifest names: `simple_llava_hf`, `chat_qwen3_vl`, ..."""
    kind, _, base = name.partition("_")
    if kind not in KINDS or base not in BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.models import get_model

    made = globals()[name] = patched_class(get_model(base, force_simple=kind == "simple"))
    return made
