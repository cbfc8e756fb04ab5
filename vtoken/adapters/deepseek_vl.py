"""DeepSeek-VL and Janus: one square grid per image; the hybrid adds features of SAM to each patch."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .base import Adapter, Layout
from .llava import find_tower
from .registry import register_adapter
from .towers.base import Tower


@register_adapter
class DeepseekVLAdapter(Adapter):
    """`DeepseekVLForConditionalGeneration`, `DeepseekVLHybridForConditionalGeneration`.

    Strategies read the attention of SigLIP, whose patches are the tokens; that of SAM is not read.
    """

    model_types: ClassVar[tuple[str, ...]] = ("deepseek_vl", "deepseek_vl_hybrid")

    def make_towers(self) -> dict[str, Tower]:
        return find_tower(self.base.vision_model, self.config)

    @property
    def square_frames(self) -> tuple[str, ...]:
        return () if hasattr(self.base, "high_res_vision_model") else self.modalities

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        return [Layout.square(f) for f in features]


class JanusTower(Tower):
    """Janus vision transformer: patches only."""

    rows_are_frames = True


@register_adapter
class JanusAdapter(DeepseekVLAdapter):
    """`JanusForConditionalGeneration` where it reads pictures; what it paints is left alone."""

    model_types = ("janus",)

    def make_towers(self) -> dict[str, Tower]:
        tower = self.base.vision_model
        return {"image": JanusTower(tower, tower.config.num_hidden_layers - 1)}
