"""Model types that no adapter can serve, and the reasons."""

from __future__ import annotations

REFUSED = {
    "mllama": "its LLM reads pictures by cross-attention, so they are no tokens of the prompt",
    "minimax_m3_vl": "its LLM chooses blocks of keys by their places in the whole prompt, which a shortened"
    " prompt moves",
}


def check_served(model_type: str | None) -> None:
    """Raise ValueError, in one sentence, for a model type that cannot be served."""
    if model_type in REFUSED:
        raise ValueError(
            f"vtoken cannot prune {model_type}: {REFUSED[model_type]}; use a model whose LLM reads pictures"
            " as tokens of the prompt, such as llava_next, qwen2_5_vl or gemma4."
        )
