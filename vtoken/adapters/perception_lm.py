"""Perception LM: Perception Encoder from timm over square tiles, average pooling."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..tokens import Segment
from .base import Adapter, Layout, square
from .registry import register_adapter
from .towers.base import Tower
from .towers.timm import TimmTower


@register_adapter
class PerceptionLMAdapter(Adapter):
    """`PerceptionLMForConditionalGeneration`.

    An image is a thumbnail and its tiles, whose places the model does not know, or a single tile. Videos are
    encoded with `get_image_features`.
    """

    model_types: ClassVar[tuple[str, ...]] = ("perception_lm",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    def make_towers(self) -> dict[str, Tower]:
        drops_cls = bool(self.config.vision_use_cls_token)
        found = TimmTower.find(self.base.vision_tower, self._pooled).get("image")
        read = found is not None and found.has_cls == drops_cls
        return dict.fromkeys(self.modalities, found) if found is not None and read else {}

    def _pooled(self, values: Tensor) -> Tensor:
        """(..., patches) -> (..., cells), the mean over the patches that the projector pools."""
        patches = values.flatten(0, -2)[..., None].float()
        cells: Tensor = self.base.multi_modal_projector.pooling(patches)
        return cells[..., 0].unflatten(0, values.shape[:-1])

    def split_features(self, modality: str, output: Any, arguments: dict[str, Any]) -> list[Tensor]:
        tiles = arguments[self.pixel_argument(arguments)].shape[1]
        return list(output.pooler_output.unflatten(0, (-1, tiles)).flatten(1, 2))

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        tiles = arguments[self.pixel_argument(arguments)].shape[1]
        kinds = ["image"] if tiles == 1 else ["thumbnail", *["crop"] * (tiles - 1)]
        kinds = ["frame"] * tiles if modality == "video" else kinds
        grid = square(len(features[0]) // tiles)
        segments = [Segment(kind, grid) for kind in kinds]
        return [Layout.plain(segments, f.device) for f in features]
