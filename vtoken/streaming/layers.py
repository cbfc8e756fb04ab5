"""Run the layers of a plain rotary decoder one by one, with keys before rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapters.base import Adapter
from ..mechanism.attention_rows import heads, rotate

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
TIED_TO_LENGTH = ("dynamic", "longrope")  # rotary tables that change with the sequence


class Layers:
    """A pre-norm decoder (Llama, Mistral, Qwen2, Qwen3) run with custom attention.

    Args:
        adapter: the model's parts.

    Raises:
        ValueError: for decoders with multimodal rope, sliding windows, other layers, or tables that change
            with the length.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.decoder, kind = adapter.decoder, adapter.config.model_type
        config = self.decoder.config
        lacks = None
        if hasattr(adapter.base, "get_rope_index"):
            lacks = "one-dimensional positions, and this model has multimodal rope"
        elif set(getattr(config, "layer_types", None) or ()) - {"full_attention"} or self._slides(config):
            lacks = "full attention in every layer, and this LLM has sliding windows"
        elif any({n for n, _ in layer.named_children()} != PARTS for layer in self.decoder.layers):
            lacks = f"layers of {', '.join(sorted(PARTS))}, and this LLM has others"
        elif (getattr(config, "rope_parameters", None) or {}).get("rope_type") in TIED_TO_LENGTH:
            lacks = "rotary tables that do not change with the length of the prompt"
        if lacks is None and self._error() > 0.05:
            lacks = "layers that only attend and pass an MLP, and this LLM does more"
        if lacks is not None:
            raise ValueError(f"memory='rekv' cannot serve {kind}: it needs {lacks}; use memory='recent'.")

    @staticmethod
    def _slides(config: Any) -> bool:
        """Whether windows slide: Mistral names no layer types; Qwen2 names a window that it does not use."""
        return (
            not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None) is not None
        )

    def __len__(self) -> int:
        return len(self.decoder.layers)

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids: (n,) int64 -> (1, n, d)."""
        return self.decoder.embed_tokens(ids.to(self.device))[None]

    def tables(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1, n, rotary_dim) of (n,) int64 positions."""
        return self.decoder.rotary_emb(like, positions[None].to(like.device))

    @torch.no_grad()
    def run(self, hidden: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Run (1, n, d) through all layers.

        Args:
            attend: `attend(layer, q, k, v)` with q (1, H, n, D), k and v (1, Hkv, n, D), q and k before their
                rotation, returns the attention's output (1, H, n, D).
        """
        for i, layer in enumerate(self.decoder.layers):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            out = attend(i, *(heads(attention, x, which) for which in "qkv"))
            hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden

    def sdpa(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False
    ) -> Tensor:
        """Attention of rotated (1, H, n, D) over (1, Hkv, m, D) at the layer's scale; `mask` (n, m) bool."""
        scale = self.decoder.layers[layer].self_attn.scaling
        gqa = q.shape[1] != k.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
        )

    @torch.no_grad()
    def _error(self) -> float:
        """Relative difference between `run` and the decoder's own forward on a few tokens."""
        hidden = self.embed(torch.arange(5) % self.decoder.embed_tokens.num_embeddings)
        tables = self.tables(hidden, torch.arange(5))
        mine = self.run(
            hidden,
            lambda i, q, k, v: self.sdpa(i, rotate(q, *tables), rotate(k, *tables), v, None, causal=True),
        )
        own: Any = self.decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state
        mine = self.decoder.norm(mine)
        return float((mine - own).float().norm() / own.float().norm().clamp(min=1e-6))
