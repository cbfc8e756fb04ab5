"""The InternViT tower of InternVL: a class token, and norms (or none) after the q/k projections."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Tower


class InternTower(Tower):
    """InternVL vision transformer: token 0 is the class token."""

    has_cls = True
    rows_are_frames = True

    def find_layers(self) -> list[nn.Module]:
        return list(self.module.encoder.layer)  # type: ignore[union-attr, arg-type]

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].attention  # type: ignore[return-value]

    def projections(self, layer: int) -> tuple[nn.Module, nn.Module]:
        attention: Any = self.attention(layer)
        return attention.q_norm, attention.k_norm
