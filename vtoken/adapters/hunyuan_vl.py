"""HunYuan-VL: SigLIP over grids of any shape; rows end with a newline, pictures begin and end with a mark."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens import Segment
from .base import Adapter, Layout
from .registry import register_adapter
from .towers.base import Tower
from .towers.packed_split import PackedSplitTower


@register_adapter
class HunYuanVLAdapter(Adapter):
    """`HunYuanVLForConditionalGeneration`. Marks and newlines are made by the model and are no patches."""

    model_types = ("hunyuan_vl",)

    def make_towers(self) -> dict[str, Tower]:
        tower = self.base.vision_tower
        return {"image": PackedSplitTower(tower, len(tower.layers) - 1)}

    def frames(self, modality: str, arguments: dict[str, Any]) -> list[int]:
        return [1] * len(arguments["image_grid_thw"])

    def split_features(self, modality: str, output: Any, arguments: dict[str, Any]) -> list[Tensor]:
        features = output.pooler_output
        if isinstance(features, Tensor):  # transformers 5.17 does not split (1, all, d)
            rows, columns = (arguments["image_grid_thw"][:, 1:] // self.side).unbind(-1)
            features = features[0].split((rows * (columns + 1) + 2).tolist())
        return list(features)

    @property
    def side(self) -> int:
        """Patches along one side of a cell."""
        return int(self.config.vision_config.spatial_merge_size)

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        side, out = self.side, []
        for (_, h, w), f in zip(arguments["image_grid_thw"].tolist(), features, strict=True):
            rows, columns = grid = h // side, w // side
            cells = torch.arange(rows * columns, device=f.device).view(grid)
            cells = torch.nn.functional.pad(cells, (0, 1), value=-1).flatten()
            out.append(Layout([Segment("image", grid)], torch.nn.functional.pad(cells, (1, 1), value=-1)))
        return out
