"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from .base import Tower
from .blocks import Block, FusedBlock
from .packed import PackedTower, Packing


class QwenTower(PackedTower):
    """Qwen vision transformer: blocks of merge_size x merge_size adjacent patches become one cell.

    Frames (and images) do not see each other; Qwen2.5-VL moreover computes most layers in windows and keeps
    its tokens in window order.
    """

    def find_layers(self) -> list[nn.Module]:
        return list(self.module.blocks)  # type: ignore[arg-type]

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].attn  # type: ignore[return-value]

    def global_layers(self) -> tuple[int, ...]:
        layers = getattr(self.module, "fullatt_block_indexes", None)
        return super().global_layers() if layers is None else tuple(sorted(layers))

    def packing(self, args: Any, kwargs: dict[str, Any]) -> Packing:
        tower: Any = self.module
        grid, merge = self._grid(args, kwargs), tower.spatial_merge_size
        items = [(t, (h // merge) * (w // merge)) for t, h, w in grid.tolist()]
        order = torch.arange(sum(t * n for t, n in items), device=grid.device)
        if hasattr(tower, "fullatt_block_indexes"):
            windows = get_vision_window_index(
                grid, merge, tower.window_size, tower.patch_size, kwargs=dict(kwargs)
            )
            order = torch.argsort(windows[0])
        unit = merge * merge
        patches = order[:, None] * unit + torch.arange(unit, device=order.device)
        return Packing(items, patches, [(h // merge, w // merge) for _, h, w in grid.tolist()])

    def projections(self, layer: int) -> tuple[nn.Module, ...]:
        return (self.attention(layer).qkv,)  # type: ignore[return-value]

    def query_key(self, layer: int, outputs: list[Tensor]) -> Iterable[Tensor]:
        heads: Any = self.attention(layer).num_heads
        return outputs[0].view(len(outputs[0]), 3, heads, -1)[:, :2].unbind(1)

    @staticmethod
    def _grid(args: Any, kwargs: dict[str, Any]) -> Tensor:
        """(items, 3) int64: frames, rows and columns of patches."""
        return kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]

    def block(self, layer: int) -> Block:
        return FusedBlock(self.layers[layer])

    @property
    def embedding(self) -> nn.Module | None:
        return getattr(self.module, "patch_embed", None)

    @property
    def mergers(self) -> list[nn.Module]:
        if hasattr(self.module, "downsample"):  # GLM's, between the last block and the merger
            return []
        more: Any = getattr(self.module, "deepstack_merger_list", ())
        return [m for m in (getattr(self.module, "merger", None), *more) if isinstance(m, nn.Module)]

    def frame_grids(self, args: Any, kwargs: dict[str, Any]) -> list[tuple[int, int]]:
        return [(h, w) for t, h, w in self._grid(args, kwargs).tolist() for _ in range(t)]


class NormedQwenTower(QwenTower):
    """Qwen vision transformer with norms after the q/k projections: its layers are computed in full only."""

    block = Tower.block

    def query_key(self, layer: int, outputs: list[Tensor]) -> Iterable[Tensor]:
        query, key = super().query_key(layer, outputs)
        attention: Any = self.attention(layer)
        return attention.q_norm(query), attention.k_norm(key)


class SplitQwenTower(QwenTower):
    """The tower of Qwen2.5-Omni, with a projection each for queries and keys: computed in full only."""

    block = Tower.block

    def projections(self, layer: int) -> tuple[nn.Module, ...]:
        attention: Any = self.attention(layer)
        return attention.q, attention.k

    def query_key(self, layer: int, outputs: list[Tensor]) -> Iterable[Tensor]:
        heads: Any = self.attention(layer).num_heads
        return (x.view(len(x), heads, -1) for x in outputs)


class GroupedQwenTower(QwenTower):
    """The tower of EXAONE 4.5, whose queries share keys in groups: computed in full only."""

    block = Tower.block

    def query_key(self, layer: int, outputs: list[Tensor]) -> Iterable[Tensor]:
        attention: Any = self.attention(layer)
        widths = [attention.q_dim, attention.kv_dim, attention.kv_dim]
        query, key, _ = outputs[0].split(widths, -1)
        return (x.view(len(x), -1, attention.head_dim) for x in (query, key))
