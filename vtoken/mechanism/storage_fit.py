"""Whether the KV cache of a model can take the form that a strategy declares."""

from __future__ import annotations

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..adapters.base import Adapter
from ..storage import AnswerEviction, Packed, SinkWindow, Storage
from .attention_rows import check_projections
from .cache_window import check_rotation


def check_storage(adapter: Adapter, storage: Storage, name: str, inside: bool) -> None:
    """Raise ValueError, in one sentence, if this model cannot hold its KV cache in the form of a strategy.

    Args:
        inside: whether the strategy drops tokens inside the LLM as well.
    """
    decoder, kind = adapter.decoder, adapter.config.model_type
    evicts = isinstance(storage, SinkWindow | AnswerEviction)
    if evicts and inside:
        raise ValueError(
            f"{name} evicts equally many tokens from every layer's cache and drops tokens inside the LLM,"
            " after which layers hold different ones: use it with a projector strategy such as farcover."
        )
    if not adapter.caches or (evicts and not hasattr(decoder, "layers")):
        raise ValueError(
            f"{name} acts on a KV cache, which the LLM of this {kind} model does not have or does not show:"
            " use a projector strategy."
        )
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=decoder.config).layers):
        raise ValueError(
            f"{name} needs an LLM whose layers all cache one slot per token, and this {kind} model has"
            " others, such as sliding windows: use a projector strategy."
        )
    if isinstance(storage, Packed):
        check_heads(decoder.config, storage, name, kind)
    elif isinstance(storage, SinkWindow):
        check_rotation(decoder, name, kind)
    elif isinstance(storage, AnswerEviction):
        if not adapter.rotates_everywhere:
            raise ValueError(
                f"{name} reads the LLM's attention, which vtoken recomputes with rotary embeddings; the LLM"
                f" of this {kind} model has layers without positions: use a projector strategy."
            )
        check_projections(decoder, name, kind)


def check_heads(config: object, storage: Packed, name: str, kind: str) -> None:
    """Raise ValueError if groups of channels do not fill the heads."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # type: ignore[attr-defined]
    if storage.value_groups == "token" and width % storage.group:
        raise ValueError(
            f"{name} cannot group the {width} channels of a head of this {kind} model by {storage.group}: use"
            " value_groups='channel', or another group."
        )
