"""Nemotron-H Omni: RADIO over grids of any shape and tubelets of frames, an LLM of Mamba layers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..tokens import Segment
from .base import Adapter, Layout
from .registry import register_adapter
from .towers.base import Tower


@register_adapter
class NemotronOmniAdapter(Adapter):
    """`NemotronH_Omni_Reasoning_V3`. Images and videos share a placeholder; a frame is one tubelet of frames.

    The model has a pruner of its own for videos, Efficient Video Sampling, which drops tokens between the
    features and the language model. Two choices would meet: one of both must be off.
    """

    model_types = ("nemotron_h_omni",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    def make_towers(self) -> dict[str, Tower]:
        return {}  # images are packed with class tokens between them, whose attention is not read

    def frames(self, modality: str, arguments: dict[str, Any]) -> list[int]:
        return super().frames(modality, arguments) if modality == "video" else []

    def find_placeholders(self, input_ids: Tensor) -> dict[str, Tensor]:
        mask = input_ids == self.config.image_token_id
        return dict.fromkeys(self.modalities, mask)

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        if modality == "image":
            grids = [(int(h) // 2, int(w) // 2) for h, w in arguments["image_grid_hw"].tolist()]
            kinds = zip(grids, features, strict=True)
            return [Layout.plain([Segment("image", grid)], f.device) for grid, f in kinds]
        if self.model.video_pruning_rate > 0:
            raise NotImplementedError(  # after the features, before the LLM reads a token
                f"This nemotron_h_omni model prunes videos itself (video_pruning_rate ="
                f" {self.model.video_pruning_rate}): set model.video_pruning_rate = 0, or unpatch it."
            )
        pixels = arguments["pixel_values_videos"]
        cell = 2 * self.base.vision_model.patch_size
        grid = (pixels.shape[-2] // cell, pixels.shape[-1] // cell)
        steps = [len(f) // (grid[0] * grid[1]) for f in features]
        return [
            Layout.plain([Segment("frame", grid)] * t, f.device) for t, f in zip(steps, features, strict=True)
        ]
