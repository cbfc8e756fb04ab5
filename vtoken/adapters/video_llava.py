"""Video-LLaVA: one tower for images, another for videos, whose frames keep their CLS token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .anyres import frame_count, frames_layout
from .base import Layout, square
from .llava import LlavaAdapter, find_tower
from .registry import register_adapter
from .towers.base import Tower


@register_adapter
class VideoLlavaAdapter(LlavaAdapter):
    """`VideoLlavaForConditionalGeneration`: as LLaVA-1.5; a frame is a CLS row (cell -1) and patches."""

    model_types = ("video_llava",)
    modalities = ("image", "video")

    def make_towers(self) -> dict[str, Tower]:
        return find_tower(self.base.image_tower, self.config) | find_tower(
            self.base.video_tower, self.config, "video"
        )

    def split_features(self, modality: str, output: Any, arguments: dict[str, Any]) -> list[Tensor]:
        if modality == "image":
            return super().split_features(modality, output, arguments)
        return list(output.pooler_output.unflatten(0, (-1, frame_count(arguments))).flatten(1, 2))

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        if modality == "image":
            return super().layouts(modality, features, arguments)
        frames = frame_count(arguments)
        cls = int("video" not in self.towers or self.towers["video"].has_cls)
        return [frames_layout(frames, square(len(f) // frames - cls), leading=cls) for f in features]
