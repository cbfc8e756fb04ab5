"""LLaVA-1.5, ViP-LLaVA and other models of the `llava` type: one square grid per image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..tokens import Segment
from .base import Adapter, Layout, feature_layer_of, square
from .registry import register_adapter
from .towers.base import Tower
from .towers.clip import ClipTower, SiglipTower
from .towers.pixtral import PixtralTower

TOWERS: dict[str, type[Tower]] = {
    "clip_vision_model": ClipTower,
    "siglip_vision_model": SiglipTower,
    "pixtral": PixtralTower,
}


def find_tower(
    module: Any, config: Any, modality: str = "image", pool: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tower]:
    """The tower of a LLaVA-like model for one modality; empty for a tower whose attention is not read.

    `pool` is set if the model pools patches into fewer cells: (..., patches) -> (..., cells).
    """
    cls = TOWERS.get(module.config.model_type)
    if cls is None:
        return {}
    return {modality: cls(module, feature_layer_of(config, module.config.num_hidden_layers), pool)}


@register_adapter
class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration`, `VipLlavaForConditionalGeneration`."""

    model_types: ClassVar[tuple[str, ...]] = ("llava", "vipllava")

    def make_towers(self) -> dict[str, Tower]:
        return find_tower(self.base.vision_tower, self.config)

    @property
    def square_frames(self) -> tuple[str, ...]:
        return () if self.config.vision_config.model_type == "pixtral" else self.modalities

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        sizes = arguments.get("image_sizes")
        out = []
        for i, f in enumerate(features):
            if sizes is not None:
                patch = self.base.vision_tower.patch_size
                grid = (int(sizes[i][0]) // patch, int(sizes[i][1]) // patch)
                out.append(Layout.plain([Segment("image", grid)], f.device))
                continue
            strategy = arguments.get("vision_feature_select_strategy")
            if strategy is None:  # ViP-LLaVA has no such option, it always omits the CLS token
                strategy = getattr(self.config, "vision_feature_select_strategy", "default")
            # "default" drops the first row: the CLS token, or a patch of a tower without CLS token
            first = int(strategy == "default") - int(self.towers["image"].has_cls) if self.towers else 0
            grid = square(len(f) + first)
            segment = Segment("image", grid, tokens=grid[0] * grid[1] - max(0, first))
            cells = torch.arange(first, segment.size, device=f.device)
            out.append(Layout([segment], cells))
        return out
