"""EXAONE 4.5: Qwen-VL's grids and windows in the tower, an LLM with one position per token."""

from __future__ import annotations

from typing import ClassVar

from .qwen_vl import QwenVLAdapter
from .registry import register_adapter
from .towers.base import Tower
from .towers.qwen import GroupedQwenTower


@register_adapter
class ExaoneAdapter(QwenVLAdapter):
    """`Exaone4_5_ForConditionalGeneration`. Its full-attention layers have no positions, so no attention is
    read inside the LLM.
    """

    model_types = ("exaone4_5",)
    prompt_arguments: ClassVar[tuple[str, ...]] = ()
    rotates_everywhere = False

    def make_towers(self) -> dict[str, Tower]:
        tower = GroupedQwenTower(self.base.visual, len(self.base.visual.blocks) - 1)
        return {"image": tower, "video": tower}
