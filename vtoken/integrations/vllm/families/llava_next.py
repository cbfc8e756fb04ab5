"""LLaVA-NeXT in vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ....adapters.base import Layout
from ..model import PrunedModel
from ..processing import PrunedInfo, PrunedProcessor
from .llava import NEWER_NAMES, tower_attentions


class CropsModel(PrunedModel):
    """Mixin for models that read an image as a thumbnail and crops."""

    vision_tower: Any

    def attentions(self) -> Sequence[nn.Module]:
        return tower_attentions(self.vision_tower)

    def rows(self, modality: str, arguments: dict[str, Any], layouts: list[Layout]) -> list[int]:
        pixels = arguments["pixel_values" if modality == "image" else "pixel_values_videos"]
        return [len(tiles) for tiles in pixels]


class Info(PrunedInfo, LlavaNextProcessingInfo):
    """`LlavaNextProcessingInfo` of vLLM."""


class Processor(PrunedProcessor, LlavaNextMultiModalProcessor):
    """`LlavaNextMultiModalProcessor` of vLLM, with fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class VTokenLlavaNextForConditionalGeneration(CropsModel, LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration` of vLLM, with fewer visual tokens."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | NEWER_NAMES
