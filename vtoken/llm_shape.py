"""The numbers of a language model that determine its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LanguageModelShape:
    """The numbers of a decoder config that determine the cost of one of its layers."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @classmethod
    def of(cls, config: Any, layer: int = 0) -> LanguageModelShape:
        """Read a transformers text config; for a mixture of experts, the experts that one token activates.

        A layer that reads the keys and values of another layer has no kv_heads.
        """
        sharing = getattr(config, "kv_sharing_modes", None)
        if getattr(config, "is_heterogeneous", False):
            config = config.per_layer_config[layer]
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        intermediate = getattr(config, "intermediate_size", 4 * config.hidden_size)
        if isinstance(intermediate, list | tuple):
            intermediate = intermediate[layer]
        experts = getattr(config, "num_experts_per_tok", None)
        width = getattr(config, "moe_intermediate_size", None)
        if experts and width:  # a list has the experts of text first, then those of pictures
            intermediate = experts * (width[0] if isinstance(width, list | tuple) else width)
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=0 if sharing and sharing[layer] == "reuse" else kv_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=intermediate,
        )

    def layer_flops(
        self, tokens: float, past: float = 0, attended: float | None = None, probes: float = 0
    ) -> float:
        """FLOPs of a gated-MLP layer on `tokens` after `past`: 2 per multiply-add, half the square map.

        Args:
            tokens: that pass the MLP.
            past: tokens in the KV cache.
            attended: tokens that pass attention, None for all.
            probes: queries whose attention to all tokens was computed before, to choose the attended ones.
        """
        attended = tokens if attended is None else attended
        projections = 2 * self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = 6 * self.hidden * self.intermediate
        attention = 4 * attended * (past + attended / 2) * self.heads * self.head_dim
        choice = 0.0
        if probes:
            width = self.hidden * self.head_dim
            choice = 2 * width * (tokens * self.kv_heads + probes * self.heads)
            choice += 2 * probes * (past + tokens) * self.heads * self.head_dim
        return attended * projections + tokens * mlp + attention + choice

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of one layer's keys and values."""
        return 2 * tokens * self.kv_heads * self.head_dim * itemsize
