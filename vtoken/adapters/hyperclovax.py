"""HyperCLOVA X SEED Think: the tower and the geometry of Qwen2.5-VL before an LLM with plain positions."""

from __future__ import annotations

from typing import ClassVar

from .qwen_vl import QwenVLAdapter
from .registry import register_adapter
from .towers.base import Tower
from .towers.qwen import QwenTower


@register_adapter
class HyperClovaXAdapter(QwenVLAdapter):
    """`HyperCLOVAXVisionV2ForConditionalGeneration`."""

    model_types: ClassVar[tuple[str, ...]] = ("hyperclovax_vision_v2",)
    prompt_arguments: ClassVar[tuple[str, ...]] = ()

    @property
    def merge_size(self) -> int:
        return int(self.base.vision_model.spatial_merge_size)

    def make_towers(self) -> dict[str, Tower]:
        tower = self.base.vision_model
        return dict.fromkeys(self.modalities, QwenTower(tower, len(tower.blocks) - 1))
