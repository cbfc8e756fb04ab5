"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed sequences, fused projections, rotary embedding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from ..._threads import PerThread
from ...kernels import received_attention
from ...tokens import Needs
from .base import Capture, Tower
from .rotary import rotate


class QwenTower(Tower):
    """All patches of all images and videos of a call in one sequence, blocks of merge_size x merge_size side by side.

    Frames (and images) do not see each other; Qwen2.5-VL moreover computes most layers in windows and keeps its tokens in
    window order, which is undone here. A cell is one merged block: the mean of its patches.
    """

    def find_layers(self) -> list[nn.Module]:
        return list(self.module.blocks)

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].attn  # type: ignore[return-value]

    def global_layers(self) -> tuple[int, ...]:
        layers = getattr(self.module, "fullatt_block_indexes", None)
        return super().global_layers() if layers is None else tuple(sorted(layers))

    @property
    def merge_size(self) -> int:
        """Side of the square of patches that becomes one cell."""
        return int(self.module.spatial_merge_size)  # type: ignore[arg-type]

    def to_cells(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, (-1, self.merge_size**2)).mean(-1)

    def tap(self, needs: Needs, active: Callable[[], Capture | None]) -> list[Any]:
        layers = sorted({*needs.received_attention, *needs.keys})
        if not layers:
            return []
        forward = _Forward()
        before = functools.partial(self._before_tower, forward, active)
        handles = [self.module.register_forward_pre_hook(before, with_kwargs=True)]
        for layer in layers:
            attention: Any = self.attention(layer)
            note = functools.partial(self._before_attention, forward)
            handles.append(attention.register_forward_pre_hook(note, with_kwargs=True))
            read = functools.partial(self._on_projections, forward, active, layer)
            handles.append(attention.qkv.register_forward_hook(read))
        return handles

    def _before_tower(
        self, forward: _Forward, active: Callable[[], Capture | None], module: Any, args: Any, kwargs: dict[str, Any]
    ) -> None:
        if active() is None:
            return
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        forward.grids = [(t, h // self.merge_size * (w // self.merge_size)) for t, h, w in grid.tolist()]
        forward.order = None
        if hasattr(module, "fullatt_block_indexes"):
            index, _ = get_vision_window_index(
                grid, self.merge_size, module.window_size, module.patch_size, kwargs=dict(kwargs)
            )
            forward.order = torch.argsort(index)

    def _before_attention(self, forward: _Forward, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        forward.bounds, forward.rotary = kwargs["cu_seqlens"], kwargs["position_embeddings"]

    def _on_projections(
        self, forward: _Forward, active: Callable[[], Capture | None], layer: int, module: Any, args: Any, out: Tensor
    ) -> None:
        capture = active()
        if capture is None:
            return
        with torch.no_grad():
            heads = self.attention(layer).num_heads
            query, key = rotate(out.detach().view(len(out), 3, heads, -1)[:, :2].unbind(1), forward.rotary, dim=-2)
            if layer in capture.needs.received_attention:
                received = received_attention(
                    query.transpose(0, 1)[None], key.transpose(0, 1)[None], self.scale(layer), forward.bounds
                )
                self._add(capture, "received_attention", layer, received[0], forward)
            if layer in capture.needs.keys:
                self._add(capture, "keys", layer, key.flatten(1).T, forward)

    def _add(self, capture: Capture, what: str, layer: int, value: Tensor, forward: _Forward) -> None:
        """Store values per patch (..., patches), item by item."""
        cells = self.to_cells(value).movedim(-1, 0)
        cells = cells if forward.order is None else cells[forward.order.to(cells.device)]
        for item, (frames, size) in zip(cells.split([t * n for t, n in forward.grids]), forward.grids, strict=True):
            capture.add(what, layer, item.unflatten(0, (frames, size)))


class _Forward(PerThread):
    """One forward of the tower: frames and cells per frame of each item, and what its attention modules are given."""

    grids: list[tuple[int, int]] = []
    order: Tensor | None = None
    bounds: Tensor | None = None
    rotary: Any = None
