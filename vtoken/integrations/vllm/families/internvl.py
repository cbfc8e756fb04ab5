"""InternVL in the format of transformers, in vLLM: images as tiles, without marks between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ....adapters.base import Layout
from ....tokens import Segment
from ..geometry import Geometry
from ..model import PrunedModel
from ..processing import PrunedInfo, PrunedProcessor


class Tiles(Geometry):
    """Square tiles of one size; where they lie on the image is not known."""

    def layouts(self, modality: str, count: int, arguments: dict[str, Any]) -> list[Layout]:
        config = self.adapter.config
        vision, shrink = config.vision_config, config.downsample_ratio
        grid = tuple(int(n // p * shrink) for n, p in zip(vision.image_size, vision.patch_size, strict=True))
        tile = Segment("image", grid)  # type: ignore[arg-type]
        return [Layout.plain([tile] * int(n), "cpu") for n in arguments["image_num_patches"]]


class Info(PrunedInfo, InternS1ProcessingInfo):
    """`InternS1ProcessingInfo` of vLLM, without videos: vtoken knows their frames as images only."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}


class Processor(PrunedProcessor, InternS1MultiModalProcessor):
    """`InternS1MultiModalProcessor` of vLLM, with fewer placeholders."""

    geometry_class = Tiles

    def count(self, modality: str, data: Mapping[str, Any]) -> int:
        return len(data["image_num_patches"]) if modality == "image" and "pixel_values" in data else 0


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=InternS1DummyInputsBuilder)
class VTokenInternVLForConditionalGeneration(PrunedModel, InternS1ForConditionalGeneration):
    """`InternS1ForConditionalGeneration` of vLLM, which serves InternVL, with fewer visual tokens."""

    geometry_class = Tiles

    def attentions(self) -> Sequence[nn.Module]:
        return [layer.attention.attn for layer in self.vision_tower.encoder.layer]

    def part(self, modality: str, arguments: dict[str, Any], first: int, last: int) -> dict[str, Any]:
        tiles = arguments["image_num_patches"]
        start, stop = int(tiles[:first].sum()), int(tiles[:last].sum())
        pixels = arguments["pixel_values"][start:stop]
        return arguments | {"image_num_patches": tiles[first:last], "pixel_values": pixels}
