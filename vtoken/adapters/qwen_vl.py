"""The Qwen-VL families from Qwen2-VL to Qwen3.5: grids of any shape, merged patches, multimodal rope."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..tokens import Segment
from .base import Adapter, Layout
from .registry import register_adapter
from .towers.base import Tower
from .towers.qwen import QwenTower


@register_adapter
class QwenVLAdapter(Adapter):
    """`Qwen2VL...`, `Qwen2_5_VL...`, `Qwen3VL...`, `Qwen3VLMoe...`, `Qwen3_5...` and
    `Qwen3_5MoeForConditionalGeneration`. The LLM of Qwen3.5 alternates linear and full attention.

    An image is one segment; a frame of a video is one temporal patch (two sampled frames). Its time is known
    if the prompt has `second_per_grid_ts` (Qwen2.5-VL); Qwen3-VL and Qwen3.5 write times as text between the
    frames' placeholders.
    """

    model_types: ClassVar[tuple[str, ...]] = (
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_5",
        "qwen3_5_moe",
    )
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    prompt_arguments: ClassVar[tuple[str, ...]] = ("second_per_grid_ts",)

    def make_towers(self) -> dict[str, Tower]:
        tower = QwenTower(self.base.visual, len(self.base.visual.blocks) - 1)
        return {"image": tower, "video": tower}

    def frames(self, modality: str, arguments: dict[str, Any]) -> list[int]:
        return [int(t) for t in arguments[f"{modality}_grid_thw"][:, 0].tolist()]

    @property
    def merge_size(self) -> int:
        """The side of the square of patches that makes a cell."""
        return int(self.base.visual.spatial_merge_size)

    def merge_sizes(self, modality: str, arguments: dict[str, Any]) -> list[int]:
        """Merge sizes of the items of a call."""
        return [self.merge_size] * len(arguments[f"{modality}_grid_thw"])

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        merges = self.merge_sizes(modality, arguments)
        times = arguments.get("second_per_grid_ts") if modality == "video" else None
        out = []
        for i, (t, h, w) in enumerate(arguments[f"{modality}_grid_thw"].tolist()):
            merge, step = merges[i], None if times is None else float(times[i])
            segments = [
                Segment(
                    "frame" if modality == "video" else "image",
                    (h // merge, w // merge),
                    seconds=None if step is None else frame * step,
                )
                for frame in range(t)
            ]
            out.append(Layout.plain(segments, features[i].device))
        return out
