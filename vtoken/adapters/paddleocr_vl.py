"""PaddleOCR-VL: SigLIP over grids of any shape, merged patches, multimodal rope."""

from __future__ import annotations

from .qwen_vl import QwenVLAdapter
from .registry import register_adapter
from .towers.base import Tower
from .towers.packed_split import PackedSplitTower


@register_adapter
class PaddleOcrVLAdapter(QwenVLAdapter):
    """`PaddleOCRVLForConditionalGeneration`: images only."""

    model_types = ("paddleocr_vl",)
    modalities = ("image",)

    def make_towers(self) -> dict[str, Tower]:
        tower = self.base.visual
        return {"image": PackedSplitTower(tower, tower.config.num_hidden_layers - 1)}

    @property
    def merge_size(self) -> int:
        return int(self.config.vision_config.spatial_merge_size)
