"""Mistral3 and LightOnOCR: a Pixtral tower over images of any size, patches merged in squares."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..tokens import Segment
from .base import Adapter, Layout, feature_layer_of
from .registry import register_adapter
from .towers.base import Tower
from .towers.pixtral import PixtralTower


@register_adapter
class Mistral3Adapter(Adapter):
    """`Mistral3ForConditionalGeneration`. The break tokens between rows are text and always stay."""

    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)

    @property
    def tower(self) -> Any:
        return self.base.vision_tower

    def make_towers(self) -> dict[str, Tower]:
        tower = self.tower
        if tower.config.model_type != "pixtral":
            return {}
        layer = feature_layer_of(self.config, tower.config.num_hidden_layers)
        return {"image": PixtralTower(tower, layer, merge_size=self.config.spatial_merge_size)}

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        cell = self.tower.patch_size * self.config.spatial_merge_size
        sizes = [(int(h) // cell, int(w) // cell) for h, w in arguments["image_sizes"]]
        return [
            Layout.plain([Segment("image", grid)], f.device) for grid, f in zip(sizes, features, strict=True)
        ]


@register_adapter
class LightOnOcrAdapter(Mistral3Adapter):
    """`LightOnOcrForConditionalGeneration`: placeholders without breaks between rows."""

    model_types: ClassVar[tuple[str, ...]] = ("lighton_ocr",)

    @property
    def tower(self) -> Any:
        return self.base.vision_encoder
