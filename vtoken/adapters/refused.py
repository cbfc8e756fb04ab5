"""Model types and language models whose visual tokens vtoken does not drop, each with the reason."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

QUERIES = (
    "a Q-Former turns each picture into a few dozen learned queries (32 in the published models), of which"
    " none is a part of the picture and there is next to nothing to save"
)
ENTERED_INSIDE = (
    "its language model is given image features or pixels and enters them itself, while vtoken shortens the"
    " embeddings that reach a language model"
)
ENCODER_DECODER = (
    "visual tokens enter the encoder of an encoder-decoder model, while vtoken shortens the prompts of"
    " decoders"
)
CROSS_ATTENTION = (
    "its language model reads pictures by cross-attention, so that no token of the prompt is one"
)
REASONS = {
    "blip-2": QUERIES,
    "instructblip": QUERIES,
    "instructblipvideo": QUERIES,
    "florence2": ENCODER_DECODER,
    "kosmos-2": ENTERED_INSIDE,
    "kosmos-2.5": ENTERED_INSIDE,
    "phi4_multimodal": ENTERED_INSIDE,
    "mllama": CROSS_ATTENTION,
    "idefics": CROSS_ATTENTION,
}

CHOSEN_KEYS = (
    "it chooses among keys by an index over the KV cache, which does not fit a cache that holds fewer tokens"
    " than the prompt"
)
DISTANCES = (
    "it measures the distance of two tokens by their places in the KV cache, so that kept tokens would not"
    " keep their positions"
)
ALIBI = (
    "it counts positions by the tokens that it reads and takes no position_ids, so that kept tokens would not"
    " keep theirs"
)
NO_SLOTS = "it has no attention layers, whose KV cache counts the tokens of a prompt"
WINDOW_AFTER_PROMPT = (
    "its KV cache keeps the prompt apart from a window of generated tokens and is told the prompt's length"
)
LANGUAGE_MODELS = {
    "bloom": ALIBI,
    "mpt": ALIBI,
    "mamba": NO_SLOTS,
    "mamba2": NO_SLOTS,
    "falcon_mamba": NO_SLOTS,
    "minimax_m3_vl_text": CHOSEN_KEYS,
    "inkling_text": DISTANCES,
    "inkling2_text": DISTANCES,
    "inkling2_loop_text": DISTANCES,
}


def reason(model: Any) -> str | None:
    """A sentence that says why the tokens of a model are not dropped; None if no reason is known.

    Args:
        model: any model; the config of a transformers model tells its type.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    why = REASONS.get(kind or "")
    if why is None and getattr(config, "is_encoder_decoder", False):
        why = ENCODER_DECODER
    advice = "use a model whose visual tokens are patches in a decoder's prompt, such as qwen3_vl"
    return None if why is None else f"vtoken drops no tokens in models of type {kind!r}: {why}; {advice}."


def language_model_reason(decoder: Any) -> str | None:
    """A sentence that says why the prompts of a language model cannot be shortened; None if they can.

    An index of keys, and a window after the prompt, are known by the layers that transformers makes for the
    KV cache.
    """
    config = getattr(decoder, "config", None)
    kind = getattr(config, "model_type", None)
    why = LANGUAGE_MODELS.get(kind or "")
    layers = cache_layers(config) if why is None else []
    if any(hasattr(layer, "update_indexer") for layer in layers):
        why = CHOSEN_KEYS
    if any(hasattr(layer, "set_prefill_length") for layer in layers):
        why = WINDOW_AFTER_PROMPT
    advice = "use a model over another language model, such as qwen3_vl"
    told = f"vtoken drops no tokens before a language model of type {kind!r}: {why}; {advice}."
    return None if why is None else told


def cache_layers(config: Any) -> list[Any]:
    """The layers of the KV cache for a language model; none if its config does not tell."""
    try:
        return list(DynamicCache(config=config).layers)
    except (AttributeError, KeyError):
        return []
