"""Qwen3-VL in vLLM: text between the frames of a video, and features of earlier tower layers (DeepStack)."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..processing import PrunedInfo
from .qwen2_vl import QwenGeometry, QwenModel, QwenProcessor


class FramesApart(QwenGeometry):
    """Every frame of a video has positions of its own, from the end of the text before it."""

    apart: ClassVar[tuple[str, ...]] = ("video",)

    def steps(self, modality: str, count: int, arguments: dict[str, Any]) -> list[float]:
        return [0.0] * count


class Info(PrunedInfo, Qwen3VLProcessingInfo):
    """`Qwen3VLProcessingInfo` of vLLM."""


class Processor(QwenProcessor, Qwen3VLMultiModalProcessor):
    """`Qwen3VLMultiModalProcessor` of vLLM, with fewer placeholders."""

    geometry_class = FramesApart


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class VTokenQwen3VLForConditionalGeneration(QwenModel, Qwen3VLForConditionalGeneration):
    """`Qwen3VLForConditionalGeneration` of vLLM, with fewer visual tokens."""

    geometry_class = FramesApart

    def read_width(self) -> int | None:
        return self.visual_dim
