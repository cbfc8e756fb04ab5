"""Qwen2-VL in vLLM, and what Qwen2.5-VL shares with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ....adapters.base import Layout
from ..geometry import Geometry
from ..model import PrunedModel
from ..positions import grid_positions
from ..processing import PrunedInfo, PrunedProcessor
from ..reduction import PIXELS


class QwenGeometry(Geometry):
    """Positions of multimodal rope: time, row and column."""

    def positions(self, modality: str, layouts: list[Layout], arguments: dict[str, Any]) -> list[Tensor]:
        steps = self.steps(modality, len(layouts), arguments)
        return [
            grid_positions(len(layout.segments), *layout.segments[0].grid, step)
            for layout, step in zip(layouts, steps, strict=True)
        ]

    def steps(self, modality: str, count: int, arguments: dict[str, Any]) -> list[float]:
        """Per image or video, positions from one frame to the next."""
        return [1.0] * count


class QwenProcessor(PrunedProcessor):
    """Mixin for processors whose items have a grid of patches."""

    geometry_class = QwenGeometry

    def count(self, modality: str, data: Mapping[str, Any]) -> int:
        return 0 if PIXELS[modality] not in data else len(data[f"{modality}_grid_thw"])


class QwenModel(PrunedModel):
    """Mixin for models whose pixels are patches of all items, one after the other."""

    geometry_class = QwenGeometry
    visual: Any

    def attentions(self) -> Sequence[nn.Module]:
        return [block.attn.attn for block in self.visual.blocks]

    def part(self, modality: str, arguments: dict[str, Any], first: int, last: int) -> dict[str, Any]:
        grids = arguments[f"{modality}_grid_thw"]
        ends = torch.cat([grids.new_zeros(1), grids.prod(-1).cumsum(0)]).tolist()
        out = super().part(modality, arguments, first, last)
        out[PIXELS[modality]] = arguments[PIXELS[modality]][ends[first] : ends[last]]
        return out

    def tower_arguments(self, modality: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
        return arguments[PIXELS[modality]], arguments[f"{modality}_grid_thw"].cpu()

    def get_encoder_cudagraph_config(self) -> Any:
        # without modalities: a captured encoder would not pass through embed_multimodal
        return replace(super().get_encoder_cudagraph_config(), modalities=[])  # type: ignore[misc]


class Info(PrunedInfo, Qwen2VLProcessingInfo):
    """`Qwen2VLProcessingInfo` of vLLM."""


class Processor(QwenProcessor, Qwen2VLMultiModalProcessor):
    """`Qwen2VLMultiModalProcessor` of vLLM, with fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Qwen2VLDummyInputsBuilder)
class VTokenQwen2VLForConditionalGeneration(QwenModel, Qwen2VLForConditionalGeneration):
    """`Qwen2VLForConditionalGeneration` of vLLM, with fewer visual tokens."""
