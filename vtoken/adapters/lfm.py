"""LFM2-VL and LFM3-VL: grids of any shape, merged patches, an LLM of short convolutions and attention."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..tokens import Segment
from .base import Adapter, Layout
from .qwen_vl import QwenVLAdapter
from .registry import register_adapter
from .towers.base import Tower


@register_adapter
class Lfm2VlAdapter(Adapter):
    """`Lfm2VlForConditionalGeneration`: SigLIP2 over padded patches. Tiles and the thumbnail of an image,
    which the processor writes between tags, are images to the model.
    """

    model_types = ("lfm2_vl",)

    def make_towers(self) -> dict[str, Tower]:
        return {}  # images of different grids are padded to one length, whose attention is not read

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        factor = self.config.downsample_factor
        grids = [(int(h) // factor, int(w) // factor) for h, w in arguments["spatial_shapes"].tolist()]
        return [
            Layout.plain([Segment("image", grid)], f.device) for grid, f in zip(grids, features, strict=True)
        ]


@register_adapter
class Lfm3VlAdapter(QwenVLAdapter):
    """`Lfm3VlForConditionalGeneration`: patches packed as in Qwen-VL, in a tower with convolutions."""

    model_types = ("lfm3_vl",)
    prompt_arguments: ClassVar[tuple[str, ...]] = ()

    def merge_sizes(self, modality: str, arguments: dict[str, Any]) -> list[int]:
        return [self.base.vision_tower.spatial_merge_size] * len(arguments[f"{modality}_grid_thw"])

    def make_towers(self) -> dict[str, Tower]:
        return {}  # attention in some layers only, and convolutions that need whole frames
