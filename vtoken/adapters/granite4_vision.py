"""Granite 4 Vision: crops as in LLaVA-NeXT, whose features enter the LLM at several of its layers."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .anyres import anyres_layout, best_canvas
from .base import Adapter, Layout
from .registry import register_adapter
from .towers.base import Tower


@register_adapter
class Granite4VisionAdapter(Adapter):
    """`Granite4VisionForConditionalGeneration`: thumbnail, then the unpadded canvas with newlines.

    A token's features are those of all layers side by side. A Q-Former makes them from windows of patches, so
    that the tower's attention is not read.
    """

    model_types = ("granite4_vision",)
    features_field = "deepstack_features"
    features_in_layers = True

    def make_towers(self) -> dict[str, Tower]:
        return {}

    def split_features(self, modality: str, output: Any, arguments: dict[str, Any]) -> list[Tensor]:
        planes = [packed for _, packed in output.deepstack_features]
        return [torch.cat(image, -1) for image in zip(*planes, strict=True)]

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        config, out = self.config, []
        side = config.vision_config.image_size // config.vision_config.patch_size
        strategy = arguments.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
        pack = SimpleNamespace(config=config, pack_image_features=self._pack)
        for size in torch.as_tensor(arguments["image_sizes"]).tolist():
            canvas = best_canvas((size[0], size[1]), config.image_grid_pinpoints)
            cells = int(side * Fraction(config.downsample_rate))
            options = {"vision_feature_select_strategy": strategy}
            out.append(anyres_layout(pack, (size[0], size[1]), canvas, cells, **options))
        return out

    def _pack(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The model's own packing, in the form of LLaVA-NeXT's, which older releases have."""
        packed = self.base.pack_image_features(*args, **kwargs)
        return packed if isinstance(packed, tuple) else (packed,)
