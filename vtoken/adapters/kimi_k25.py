"""Kimi K2.5: packed patches of images and of chunks of frames, which become one frame of tokens each."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..tokens import Segment, VisualTokens
from .base import Adapter, Layout
from .registry import register_adapter
from .tiles import join_tiles
from .towers.base import Tower
from .towers.packed import Packing
from .towers.packed_split import PackedSplitTower


class KimiTower(PackedSplitTower):
    """MoonViT: row-major patches, all frames of a chunk see each other."""

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].attn  # type: ignore[return-value]

    def merge_size(self, kwargs: dict[str, Any]) -> int:
        return int(self.module.merge_kernel_size[0])  # type: ignore[union-attr, index]

    @property
    def provides(self) -> frozenset[str]:
        return super().provides - {"states"}

    def packing(self, args: Any, kwargs: dict[str, Any]) -> Packing:
        grid, side = kwargs["grid_thw"], self.merge_size(kwargs)
        items, patches, cells, first = [], [], [], 0
        most = math.lcm(*grid[:, 0].tolist())  # frames are repeated, so that all cells have as many patches
        for t, h, w in grid.tolist():
            one, frames = self.squares(h, w, side), first + h * w * torch.arange(t)
            patches.append((one[:, None] + frames[:, None]).repeat(1, most // t, 1).flatten(1))
            items.append((1, len(one)))
            cells.append((h // side, w // side))
            first += t * h * w
        return Packing(items, torch.cat(patches).to(grid.device), cells)


@register_adapter
class KimiK25Adapter(Adapter):
    """`Kimi_K25ForConditionalGeneration`.

    A chunk of up to four frames is averaged to the tokens of one frame, and its time is written before it as
    text. The model is not told where a video ends: chunks of one size in a prompt are one video.
    """

    model_types = ("kimi_k25",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    def make_towers(self) -> dict[str, Tower]:
        tower = self.base.vision_tower
        return dict.fromkeys(self.modalities, KimiTower(tower, len(tower.layers) - 1))

    def frames(self, modality: str, arguments: dict[str, Any]) -> list[int]:
        return [1] * len(arguments[f"{modality}_grid_thw"])

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        (rows, columns), kind = self.base.vision_tower.merge_kernel_size, modality.replace("video", "frame")
        return [
            Layout.plain([Segment(kind, (h // rows, w // columns))], f.device)
            for (_, h, w), f in zip(arguments[f"{modality}_grid_thw"].tolist(), features, strict=True)
        ]

    def join(self, items: list[VisualTokens], input_ids: Tensor | None, places: Tensor) -> list[VisualTokens]:
        if items[0].modality == "image":
            return items
        videos, first = [], 0
        for i in range(1, len(items) + 1):
            if i == len(items) or items[i].segments != items[first].segments:
                videos.append(
                    join_tiles(items[first:i], [t.segments[0] for t in items[first:i]], range(i - first))
                )
                first = i
        return videos
