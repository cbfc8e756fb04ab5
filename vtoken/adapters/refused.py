"""Model types whose visual tokens vtoken does not drop, each with the reason."""

from __future__ import annotations

QUERIES = (
    "a Q-Former turns each picture into a few dozen learned queries (32 in the published models), of which"
    " none is a part of the picture and there is next to nothing to save"
)
ENTERED_INSIDE = (
    "its language model is given image features or pixels and enters them itself, while vtoken shortens the"
    " embeddings that reach a language model"
)
REASONS = {
    "blip-2": QUERIES,
    "instructblip": QUERIES,
    "instructblipvideo": QUERIES,
    "florence2": "visual tokens enter the encoder of an encoder-decoder model, while vtoken shortens the"
    " prompts of decoders",
    "kosmos-2": ENTERED_INSIDE,
    "kosmos-2.5": ENTERED_INSIDE,
    "phi4_multimodal": ENTERED_INSIDE,
    "mllama": "its language model reads pictures by cross-attention, so that no token of the prompt is one",
    "minimax_m3_vl": "its language model chooses blocks of keys by their places in the whole prompt, which a"
    " shortened prompt moves",
}


def reason(model_type: str) -> str | None:
    """A sentence that says why the tokens of a model type are not dropped; None if no reason is known.

    Strategies that act in plain encoders may still serve the vision tower.
    """
    why = REASONS.get(model_type)
    advice = "use a model whose visual tokens are patches in a decoder's prompt, such as qwen3_vl"
    return (
        None if why is None else f"vtoken drops no tokens in models of type {model_type!r}: {why}; {advice}."
    )
