"""FastVLM: one square grid per image from a convolutional tower of timm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Adapter, Layout
from .registry import register_adapter
from .towers.base import Tower


@register_adapter
class FastVlmAdapter(Adapter):
    """`FastVlmForConditionalGeneration`. The tower is mostly convolutions, and its attention is not read."""

    model_types = ("fast_vlm",)

    def make_towers(self) -> dict[str, Tower]:
        return {}

    @property
    def square_frames(self) -> tuple[str, ...]:
        return self.modalities

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        return [Layout.square(f) for f in features]
