"""InternVL in the format of transformers, in vLLM: tiles without marks between them, frames as images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
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
from ..reduction import PIXELS


class Tiles(Geometry):
    """Tiles of one size without a place on the image; text stands between the frames of a video."""

    apart: ClassVar[tuple[str, ...]] = ("video",)
    alone: ClassVar[tuple[str, ...]] = ("video",)

    def layouts(self, modality: str, count: int, arguments: dict[str, Any]) -> list[Layout]:
        config = self.adapter.config
        vision, shrink = config.vision_config, config.downsample_ratio
        grid = tuple(int(n // p * shrink) for n, p in zip(vision.image_size, vision.patch_size, strict=True))
        tile = Segment("image", grid)  # type: ignore[arg-type]
        cpu = torch.device("cpu")
        return [Layout.plain([tile] * int(n), cpu) for n in arguments[f"{modality}_num_patches"]]


class Info(PrunedInfo, InternS1ProcessingInfo):
    """`InternS1ProcessingInfo` of vLLM."""


class Processor(PrunedProcessor, InternS1MultiModalProcessor):
    """`InternS1MultiModalProcessor` of vLLM, with fewer placeholders."""

    geometry_class = Tiles

    def count(self, modality: str, data: Mapping[str, Any]) -> int:
        return len(data[f"{modality}_num_patches"]) if PIXELS[modality] in data else 0


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=InternS1DummyInputsBuilder)
class VTokenInternVLForConditionalGeneration(PrunedModel, InternS1ForConditionalGeneration):
    """`InternS1ForConditionalGeneration` of vLLM, which serves InternVL, with fewer visual tokens."""

    geometry_class = Tiles

    def attentions(self) -> Sequence[nn.Module]:
        return [layer.attention.attn for layer in self.vision_tower.encoder.layer]

    def part(self, modality: str, arguments: dict[str, Any], first: int, last: int) -> dict[str, Any]:
        count, pixels = f"{modality}_num_patches", PIXELS[modality]
        tiles = arguments[count]
        start, stop = int(tiles[:first].sum()), int(tiles[:last].sum())
        return arguments | {count: tiles[first:last], pixels: arguments[pixels][start:stop]}
