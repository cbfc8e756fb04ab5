"""The InternViT tower of InternVL: a class token, and norms (or none) after the q/k projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..encoders.layer import EncoderLayer, Heads, split_heads
from ..encoders.transformers import TransformersLayer
from .base import Tower


class InternLayer(TransformersLayer):
    """A layer with norms after the q/k projections, and layer scales."""

    @property
    def known(self) -> bool:
        return True

    def heads(self, x: Tensor, call: Mapping[str, Any]) -> Heads:
        a, x = self.module.attention, self.module.layernorm_before(x)
        parts = a.q_norm(a.q_proj(x)), a.k_norm(a.k_proj(x)), a.v_proj(x)
        query, key, value = (split_heads(p, int(a.num_heads)) for p in parts)
        return Heads(query, key, value, key)

    def mixed(self, attended: Tensor, heads: Heads) -> Tensor:
        a = self.module.attention
        return self._drop(1, self.module.lambda_1 * a.projection_dropout(a.projection_layer(attended)))

    def mlp(self, x: Tensor) -> Tensor:
        x = self.module.dropout(self.module.mlp(self.module.layernorm_after(x)))
        return self._drop(2, self.module.lambda_2 * x)

    def _drop(self, half: int, x: Tensor) -> Tensor:
        """Stochastic depth of Qianfan-OCR, which InternVL lacks."""
        drop = getattr(self.module, f"drop_path{half}", None)
        return x if drop is None else drop(x)


class InternTower(Tower):
    """InternVL vision transformer: token 0 is the class token."""

    has_cls = True
    rows_are_frames = True

    def find_layers(self) -> list[nn.Module]:
        holder = getattr(self.module, "encoder", None)  # Qianfan-OCR has none
        return list(self.module.layers if holder is None else holder.layer)  # type: ignore[union-attr, arg-type]

    def split_layers(self) -> list[EncoderLayer]:
        return [InternLayer(module) for module in self.layers]

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].attention  # type: ignore[return-value]

    def projections(self, layer: int) -> tuple[nn.Module, nn.Module]:
        attention: Any = self.attention(layer)
        return attention.q_norm, attention.k_norm
