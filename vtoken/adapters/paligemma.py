"""PaliGemma: one square SigLIP grid per image, before the text."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .base import Adapter, Layout
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

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        return [Layout.square(f) for f in features]
