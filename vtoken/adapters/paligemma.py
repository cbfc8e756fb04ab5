"""PaliGemma: one square SigLIP grid per image, before the text."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..tokens import Segment
from .base import Adapter, Layout, square
from .registry import register_adapter
from .towers.base import Tower
from .towers.clip import SiglipTower


@register_adapter
class PaliGemmaAdapter(Adapter):
    """`PaliGemmaForConditionalGeneration`."""

    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)

    def make_towers(self) -> dict[str, Tower]:
        tower = self.base.vision_tower
        if tower.config.model_type != "siglip_vision_model":
            return {}
        return {"image": SiglipTower(tower, tower.config.num_hidden_layers - 1)}

    @property
    def square_frames(self) -> tuple[str, ...]:
        return self.modalities

    def split_features(self, modality: str, output: Any, arguments: dict[str, Any]) -> list[Tensor]:
        return list(output.pooler_output)

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        return [Layout.plain([Segment("image", square(len(f)))], f.device) for f in features]
