"""LLaVA-OneVision: anyres images with a shrinkable canvas, several images as one tile each, pooled frames."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .anyres import frame_count, frames_layout
from .base import Layout
from .llava import find_tower
from .llava_next import LlavaNextAdapter
from .registry import register_adapter
from .towers.base import Tower


@register_adapter
class LlavaOnevisionAdapter(LlavaNextAdapter):
    """`LlavaOnevisionForConditionalGeneration`.

    An image alone in its prompt is a thumbnail and a canvas of crops; the model shrinks the canvas bilinearly
    if it is larger than `vision_aspect_ratio` allows (see `anyres_layout` for its cells). Images that share a
    prompt are one tile and one newline each. Frames are pooled bilinearly, and one newline ends a video.
    """

    model_types = ("llava_onevision",)
    modalities = ("image", "video")

    def make_towers(self) -> dict[str, Tower]:
        module = self.base.vision_tower
        return find_tower(module, self.config) | find_tower(module, self.config, "video", self._pool)

    def pack_options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"vision_aspect_ratio": self._given("vision_aspect_ratio", arguments)}

    def are_split(self, arguments: dict[str, Any], images: int) -> list[bool]:
        counts = arguments.get("batch_num_images")
        if counts is None:
            return [True] * images
        return [int(n) == 1 for n in counts for _ in range(int(n))]

    def _pool(self, value: Tensor) -> Tensor:
        """(..., patches) -> (..., cells), with the model's weights of the patches of a cell."""
        return self.base.apply_pooling(value.reshape(-1, value.shape[-1], 1)).view(*value.shape[:-1], -1)

    def split_features(self, modality: str, output: Any, arguments: dict[str, Any]) -> list[Tensor]:
        features = super().split_features(modality, output, arguments)
        if modality == "video" and len(features[0]) == frame_count(arguments) * self._pooled_side**2:
            newline = self.base.image_newline[None]  # older releases append it outside of get_video_features
            features = [torch.cat([f, newline.to(f)]) for f in features]
        return features

    @property
    def _pooled_side(self) -> int:
        return math.ceil(self.side / 2)

    def video_layouts(self, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        side = self._pooled_side
        return [frames_layout(frame_count(arguments), (side, side), trailing=1) for _ in features]
