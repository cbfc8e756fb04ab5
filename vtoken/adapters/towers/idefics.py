"""The towers of Idefics3 and SmolVLM: SigLIP over tiles with padding, then pixel shuffle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks import Hook
from ...kernels import received_attention
from ...tokens import Needs
from .base import Tower
from .capture import Capture


class IdeficsTower(Tower):
    """Idefics3 vision transformer. Padding patches neither attend nor are attended to."""

    def find_layers(self) -> list[nn.Module]:
        return list(self.module.encoder.layers)  # type: ignore[union-attr, arg-type]

    def taps(self, needs: Needs, active: Callable[[], Capture | None]) -> list[Hook]:
        hooks = super().taps(needs, active)
        if hooks:
            hooks.append(
                Hook(self.module, functools.partial(self._before_tower, active), before=True, kwargs=True)
            )
        return hooks

    def _before_tower(
        self,
        active: Callable[[], Capture | None],
        module: Any,
        args: Any,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        capture = active()
        if capture is not None and kwargs is not None:
            mask = kwargs.get("patch_attention_mask")
            # (tiles, patches) bool: patches that are not padding, None if there is no padding
            capture.pending["real"] = None if mask is None or bool(mask.all()) else mask.flatten(1)

    def received(self, capture: Capture, query: Tensor, key: Tensor, layer: int) -> Tensor:
        real = capture.pending.get("real")
        if real is None:
            return super().received(capture, query, key, layer)
        q, k = (x.transpose(1, 2)[real].transpose(0, 1)[None] for x in (query, key))
        bounds = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0))
        packed = received_attention(q, k, self.scale(layer), bounds)
        return torch.zeros_like(real, dtype=packed.dtype).masked_scatter(real, packed)
