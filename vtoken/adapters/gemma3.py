"""Gemma3: SigLIP, average-pooled to a square grid of soft tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Adapter, Layout, square
from .registry import register_adapter
from .towers.base import Tower
from .towers.clip import SiglipTower


@register_adapter
class Gemma3Adapter(Adapter):
    """`Gemma3ForConditionalGeneration`. Every crop of pan-and-scan is a separate image to the model."""

    model_types = ("gemma3",)

    def make_towers(self) -> dict[str, Tower]:
        tower = self.base.vision_tower
        return {"image": SiglipTower(tower, tower.config.num_hidden_layers - 1, self._pool)}

    def _pool(self, value: Tensor) -> Tensor:
        """(..., patches) -> (..., cells), pooled as the projector pools features."""
        pooled = self.base.multi_modal_projector.avg_pool(value.reshape(-1, 1, *square(value.shape[-1])))
        return pooled.reshape(*value.shape[:-1], -1)

    @property
    def square_frames(self) -> tuple[str, ...]:
        return self.modalities

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        return [Layout.square(f) for f in features]
