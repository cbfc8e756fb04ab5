"""LLaVA-NeXT in vLLM."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ....adapters.base import Layout
from ..processing import PrunedInfo, PrunedProcessor
from ..reduction import PIXELS
from .llava import NEWER_NAMES, TowerModel


class CropsModel(TowerModel):
    """Mixin for models that read an image as a thumbnail and crops."""

    def rows(self, modality: str, arguments: dict[str, Any], layouts: list[Layout]) -> list[int]:
        return [len(tiles) for tiles in arguments[PIXELS[modality]]]


class Info(PrunedInfo, LlavaNextProcessingInfo):
    """`LlavaNextProcessingInfo` of vLLM."""


class Processor(PrunedProcessor, LlavaNextMultiModalProcessor):
    """`LlavaNextMultiModalProcessor` of vLLM, with fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class VTokenLlavaNextForConditionalGeneration(CropsModel, LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration` of vLLM, with fewer visual tokens."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | NEWER_NAMES
