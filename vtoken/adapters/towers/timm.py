"""Vision transformers of timm in a `TimmWrapperModel`, read at the entrance of their blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks import Hook
from ...tokens import Needs
from ..encoders.timm import TimmLayer
from .base import Tower
from .capture import Capture


class TimmTower(Tower):
    """Blocks over tiles of one size; queries and keys are computed again from a block's input, rotated as its
    attention rotates them.
    """

    def __init__(
        self, module: nn.Module, feature_layer: int, pool: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.has_cls = getattr(module.timm_model, "cls_token", None) is not None
        super().__init__(module, feature_layer, pool)

    @classmethod
    def find(cls, module: Any, pool: Callable[[Tensor], Tensor] | None = None) -> dict[str, TimmTower]:
        """The tower of images whose features are the output of its last block; empty for one without plain
        blocks, or with other tokens than patches and one class token.
        """
        trunk = module.timm_model
        blocks = getattr(trunk, "blocks", None)
        if not isinstance(blocks, nn.Module) or not all(hasattr(b, "attn") for b in blocks.children()):
            return {}
        first = int(getattr(trunk, "cls_token", None) is not None)
        if getattr(trunk, "num_prefix_tokens", None) != first or getattr(trunk, "rope_mixed", False):
            return {}
        return {"image": cls(module, len(list(blocks.children())) - 1, pool)}

    def find_layers(self) -> list[nn.Module]:
        trunk: Any = self.module.timm_model
        return list(trunk.blocks)

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].attn  # type: ignore[return-value]

    def scale(self, layer: int) -> float:
        return float(self.attention(layer).scale)  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        return int(self.module.timm_model.embed_dim)  # type: ignore[union-attr, arg-type]

    def taps(self, needs: Needs, active: Callable[[], Capture | None]) -> list[Hook]:
        return [
            Hook(self.layers[i], functools.partial(self._on_input, active, i), before=True, kwargs=True)
            for i in sorted(needs.tower_layers)
        ]

    def _on_input(
        self,
        active: Callable[[], Capture | None],
        layer: int,
        module: nn.Module,
        args: Any,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        capture = active()
        if capture is None or kwargs is None:
            return
        with torch.no_grad():
            heads = TimmLayer(module).heads(kwargs["x"] if "x" in kwargs else args[0], kwargs)
            self.record(capture, layer, heads.query, heads.key)
