"""Towers of SigLIP layers over one packed sequence: Video-LLaMA 3, PaddleOCR-VL, HunYuan-VL."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block, SplitBlock
from .packed import PackedTower, Packing, merged_patches


class PackedSplitBlock(SplitBlock):
    """A SigLIP layer over a packed sequence."""

    def __init__(self, layer: Any) -> None:
        Block.__init__(self, layer)
        self.heads, self.scale = int(self.attention.num_heads), float(self.attention.scaling)
        self.width = self.heads * int(self.attention.head_dim)


class PackedSplitTower(PackedTower):
    """Separate q/k projections over the row-major patches of all frames, merged in squares afterwards."""

    def find_layers(self) -> list[nn.Module]:
        holder: Any = getattr(self.module, "vision_model", self.module)
        return list(getattr(holder, "encoder", holder).layers)

    def merge_size(self, kwargs: dict[str, Any]) -> int:
        """The side of the square of patches that makes a cell."""
        return int(self.module.config.spatial_merge_size)  # type: ignore[union-attr, arg-type]

    def squares(self, height: int, width: int, side: int) -> Tensor:
        """(cells, side * side) int64: the patches of every cell of a frame."""
        return merged_patches(height, width, side)

    def packing(self, args: Any, kwargs: dict[str, Any]) -> Packing:
        grid, side = kwargs["grid_thw"], self.merge_size(kwargs)
        items, patches, cells, first = [], [], [], 0
        for t, h, w in grid.tolist():
            one = self.squares(h, w, side)
            patches += [one + first + frame * h * w for frame in range(t)]
            items.append((t, len(one)))
            cells.append((h // side, w // side))
            first += t * h * w
        return Packing(items, torch.cat(patches).to(grid.device), cells)

    def query_key(self, layer: int, outputs: list[Tensor]) -> Iterable[Tensor]:
        heads: Any = self.attention(layer).num_heads
        return (x.reshape(-1, heads, x.shape[-1] // heads) for x in outputs)

    def frame_grids(self, args: Any, kwargs: dict[str, Any]) -> list[tuple[int, int]]:
        return [(h, w) for t, h, w in kwargs["grid_thw"].tolist() for _ in range(t)]


class VideoLlamaTower(PackedSplitTower):
    """The patches of a cell follow each other; each call tells how many they are."""

    def merge_size(self, kwargs: dict[str, Any]) -> int:
        sizes = set(kwargs["merge_sizes"].tolist())
        if len(sizes) != 1:
            raise NotImplementedError(
                f"One call has one merge size for all its items, found {sorted(sizes)}."
            )
        return int(sizes.pop())

    def squares(self, height: int, width: int, side: int) -> Tensor:
        return torch.arange(height * width).view(-1, side * side)

    def block(self, layer: int) -> Block:
        return PackedSplitBlock(self.layers[layer])
