"""ERNIE 4.5 VL: grids of any shape, merged patches; two frames of a video make one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .base import Layout
from .qwen_vl import QwenVLAdapter
from .registry import register_adapter
from .towers.base import Tower
from .towers.packed import Packing
from .towers.qwen import QwenTower


class ErnieTower(QwenTower):
    """A cell of a video has the patches of two frames, a cell of an image its own ones twice."""

    block = Tower.block

    @property
    def provides(self) -> frozenset[str]:
        return super().provides - {"states"}

    def packing(self, args: Any, kwargs: dict[str, Any]) -> Packing:
        one, patches, items = super().packing(args, kwargs), [], []
        each = one.patches.split([t * n for t, n in one.items])
        for (t, n), mine in zip(one.items, each, strict=True):
            frames = mine.unflatten(0, (t, n))
            patches.append(torch.cat([frames[::2], frames[1::2] if t > 1 else frames], -1).flatten(0, 1))
            items.append(((t + 1) // 2, n))
        return replace(one, items=items, patches=torch.cat(patches))


@register_adapter
class ErnieVLAdapter(QwenVLAdapter):
    """`Ernie4_5_VLMoeForConditionalGeneration`.

    A frame of a video is two frames of the tower, joined after it.
    """

    model_types = ("ernie4_5_vl_moe",)

    def make_towers(self) -> dict[str, Tower]:
        tower = self.base.vision_tower
        read: Tower = ErnieTower(tower, len(tower.blocks) - 1)
        return {"image": read, "video": read}

    @property
    def merge_size(self) -> int:
        return int(self.base.vision_tower.spatial_merge_size)

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        if modality == "video":
            grid = arguments["video_grid_thw"].clone()
            grid[:, 0] //= self.base.resampler_model.temporal_merge_size
            arguments = arguments | {"video_grid_thw": grid}
        return super().layouts(modality, features, arguments)
