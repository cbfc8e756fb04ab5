"""LLaVA-OneVision in vLLM, which cuts every image into crops, also where several share a prompt."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ....adapters.base import Layout
from ..geometry import Geometry
from ..processing import PrunedInfo, PrunedProcessor
from .llava import NEWER_NAMES
from .llava_next import CropsModel


class CropsAndFrames(Geometry):
    """Images of any size, and videos of any number of frames."""

    def layouts(self, modality: str, count: int, arguments: dict[str, Any]) -> list[Layout]:
        name = "pixel_values_videos"
        given = {k: v for k, v in arguments.items() if k != "batch_num_images"}
        if modality == "image":
            return super().layouts(modality, count, given)
        return [super(CropsAndFrames, self).layouts(modality, 1, {name: v[None]})[0] for v in given[name]]


class Info(PrunedInfo, LlavaOnevisionProcessingInfo):
    """`LlavaOnevisionProcessingInfo` of vLLM."""


class Processor(PrunedProcessor, LlavaOnevisionMultiModalProcessor):
    """`LlavaOnevisionMultiModalProcessor` of vLLM, with fewer placeholders."""

    geometry_class = CropsAndFrames


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaOnevisionDummyInputsBuilder)
class VTokenLlavaOnevisionForConditionalGeneration(CropsModel, LlavaOnevisionForConditionalGeneration):
    """`LlavaOnevisionForConditionalGeneration` of vLLM, with fewer visual tokens."""

    geometry_class = CropsAndFrames
    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | NEWER_NAMES
