"""GLM-4.1V, GLM-4.5V, GLM-4.6V, GLM-OCR: Qwen-VL's geometry, with videos in the images' placeholders."""

from __future__ import annotations

from torch import Tensor

from .qwen_vl import QwenVLAdapter
from .registry import register_adapter
from .towers.base import Tower
from .towers.qwen import NormedQwenTower, QwenTower


@register_adapter
class GlmAdapter(QwenVLAdapter):
    """`Glm4v...`, `Glm4vMoe...`, `Glm46V...` and `GlmOcrForConditionalGeneration`.

    The frames of a video are separated by their times, written as text. A prompt has images or videos: these
    models cannot tell them apart by their placeholders, and refuse both in one batch.
    """

    model_types = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")

    def make_towers(self) -> dict[str, Tower]:
        blocks = self.base.visual.blocks
        cls = NormedQwenTower if hasattr(blocks[0].attn, "q_norm") else QwenTower
        tower = cls(self.base.visual, len(blocks) - 1)
        return {"image": tower, "video": tower}

    def find_placeholders(self, input_ids: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(self.modalities, input_ids == self.config.image_token_id)
