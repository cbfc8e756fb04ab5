"""LLaVA-1.5 in vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..geometry import Geometry
from ..model import PrunedModel
from ..processing import PrunedInfo, PrunedProcessor

# checkpoints that transformers 5 saved lack the level `vision_model`
NEWER_NAMES = WeightsMapper(
    orig_to_new_prefix={
        f"vision_tower.{part}": f"vision_tower.vision_model.{part}"
        for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
    }
)


class TowerModel(PrunedModel):
    """Mixin for models with vLLM's CLIP or SigLIP tower."""

    vision_tower: Any

    def attentions(self) -> Sequence[nn.Module]:
        return [layer.self_attn.attn for layer in self.vision_tower.vision_model.encoder.layers]


class LlavaGeometry(Geometry):
    """Square images of one size."""

    def sizes(self, modality: str, count: int, arguments: dict[str, Any]) -> list[int]:
        config = self.adapter.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        rows = side * side + int(self.adapter.towers[modality].has_cls)
        return [rows - int(config.vision_feature_select_strategy == "default")] * count


class Info(PrunedInfo, LlavaProcessingInfo):
    """`LlavaProcessingInfo` of vLLM."""


class Processor(PrunedProcessor, LlavaMultiModalProcessor):
    """`LlavaMultiModalProcessor` of vLLM, with fewer placeholders."""

    geometry_class = LlavaGeometry


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class VTokenLlavaForConditionalGeneration(TowerModel, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` of vLLM, with fewer visual tokens; CLIP and SigLIP towers."""

    geometry_class = LlavaGeometry
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | NEWER_NAMES
