"""Gemma 4: images and frames of any shape as batches of patches with coordinates, pooled in squares."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..tokens import Segment
from .base import Adapter, Layout
from .registry import register_adapter
from .towers.base import Tower
from .towers.gemma import GemmaTower


@register_adapter
class Gemma4Adapter(Adapter):
    """`Gemma4ForConditionalGeneration` and `Gemma4UnifiedForConditionalGeneration`, which has no tower.

    Audio tokens are no visual tokens and always stay.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma4", "gemma4_unified")
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    def make_towers(self) -> dict[str, Tower]:
        module = getattr(self.base, "vision_tower", None)
        if module is None:
            return {}
        tower = GemmaTower(
            module, len(module.encoder.layers) - 1, self.config.vision_config.pooling_kernel_size
        )
        return dict.fromkeys(self.modalities, tower)

    def frames(self, modality: str, arguments: dict[str, Any]) -> list[int]:
        positions = arguments[f"{modality}_position_ids"]
        if modality == "image":
            return [1] * len(positions)
        if positions.ndim == 4:  # transformers before 5.23: videos of one length
            return [positions.shape[1]] * len(positions)
        return [int(n) for n in arguments["num_frames_per_video"]]

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        positions = arguments[f"{modality}_position_ids"]
        last = positions.view(-1, *positions.shape[-2:]).amax(1) + 1  # columns and rows of patches
        side = self.config.vision_config.pooling_kernel_size if self.towers else 1
        grids = [(rows // side, columns // side) for columns, rows in last.tolist()]
        out, kind = [], "frame" if modality == "video" else "image"
        for f, count in zip(features, self.frames(modality, arguments), strict=True):
            mine, grids = grids[:count], grids[count:]
            out.append(Layout.plain([Segment(kind, grid) for grid in mine], f.device))
        return out
