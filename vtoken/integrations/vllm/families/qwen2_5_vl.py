"""Qwen2.5-VL in vLLM."""

from __future__ import annotations

import math
from typing import Any

from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..processing import PrunedInfo
from .qwen2_vl import QwenGeometry, QwenModel, QwenProcessor

ROPE_THETA = 10000.0  # of vLLM's tower, whatever the configuration says


class TimedGeometry(QwenGeometry):
    """Frames of a video are as far apart as in time."""

    def steps(self, modality: str, count: int, arguments: dict[str, Any]) -> list[float]:
        seconds = arguments.get("second_per_grid_ts") if modality == "video" else None
        if seconds is None:
            return super().steps(modality, count, arguments)
        speed = float(getattr(self.adapter.config.vision_config, "tokens_per_second", 1.0))
        steps = [float(s) * speed for s in seconds]
        if odd := [step for step in steps if not 0 <= step < math.inf]:
            raise ValueError(
                f"The frames of a video must be a positive time apart, found {odd[0] / speed} s."
            )
        return steps


class Info(PrunedInfo, Qwen2_5_VLProcessingInfo):
    """`Qwen2_5_VLProcessingInfo` of vLLM."""


class Processor(QwenProcessor, Qwen2_5_VLMultiModalProcessor):
    """`Qwen2_5_VLMultiModalProcessor` of vLLM, with fewer placeholders."""

    geometry_class = TimedGeometry


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class VTokenQwen2_5_VLForConditionalGeneration(QwenModel, Qwen2_5_VLForConditionalGeneration):
    """`Qwen2_5_VLForConditionalGeneration` of vLLM, with fewer visual tokens."""

    geometry_class = TimedGeometry

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        vision = self.config.vision_config
        theta = (getattr(vision, "rope_parameters", None) or {}).get("rope_theta", ROPE_THETA)
        if theta != ROPE_THETA:
            rope = {"partial_rotary_factor": 0.5, "rope_type": "default", "rope_theta": theta}
            self.visual.rotary_pos_emb = get_rope(
                head_size=vision.hidden_size // vision.num_heads,
                max_position=8192,
                is_neox_style=True,
                rope_parameters=rope,
            )
