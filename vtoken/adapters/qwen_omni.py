"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: Qwen-VL's pictures and videos, and audio."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Layout
from .qwen_vl import QwenVLAdapter
from .registry import register_adapter
from .towers.base import Tower
from .towers.qwen import QwenTower, SplitQwenTower


@register_adapter
class QwenOmniAdapter(QwenVLAdapter):
    """`Qwen2_5OmniThinkerForConditionalGeneration`, `Qwen3OmniMoeThinkerForConditionalGeneration`.

    Audio tokens are no visual tokens and always stay, between the frames of a video too
    (`use_audio_in_video`).
    """

    model_types = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
    prompt_arguments = ("video_second_per_grid",)

    def make_towers(self) -> dict[str, Tower]:
        blocks = self.base.visual.blocks
        kind = QwenTower if hasattr(blocks[0].attn, "qkv") else SplitQwenTower
        tower = kind(self.base.visual, len(blocks) - 1)
        return {"image": tower, "video": tower}

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        times = arguments.get("video_second_per_grid")
        return super().layouts(modality, features, arguments | {"second_per_grid_ts": times})
