"""Video-LLaMA 3: SigLIP over grids of any shape, frames whose still parts the processor leaves out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .base import Layout
from .qwen_vl import QwenVLAdapter
from .registry import register_adapter
from .towers.base import Tower
from .towers.packed_split import VideoLlamaTower


@register_adapter
class VideoLlama3Adapter(QwenVLAdapter):
    """`VideoLlama3ForConditionalGeneration`.

    The processor's `video_compression_mask` says which cells of a video become tokens.
    """

    model_types = ("video_llama_3",)
    prompt_arguments = ("video_compression_mask",)

    def make_towers(self) -> dict[str, Tower]:
        tower = VideoLlamaTower(self.base.vision_model, len(self.base.vision_model.encoder.layers) - 1)
        return {"image": tower, "video": tower}

    def merge_sizes(self, modality: str, arguments: dict[str, Any]) -> list[int]:
        return arguments[f"{modality}_merge_sizes"].tolist()

    def split_features(self, modality: str, output: Any, arguments: dict[str, Any]) -> list[Tensor]:
        kept = self._kept(modality, [len(f) for f in output.pooler_output], arguments)
        return [f if k is None else f[k] for f, k in zip(output.pooler_output, kept, strict=True)]

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        whole = super().layouts(modality, features, arguments)
        kept = self._kept(modality, [len(layout.cells) for layout in whole], arguments)
        out = []
        for layout, mask in zip(whole, kept, strict=True):
            if mask is not None:
                fed = [int(m.sum()) for m in mask.split([s.size for s in layout.segments])]
                segments = [replace(s, tokens=n) for s, n in zip(layout.segments, fed, strict=True)]
                layout = Layout(segments, mask.nonzero()[:, 0])
            out.append(layout)
        return out

    @staticmethod
    def _kept(modality: str, sizes: list[int], arguments: dict[str, Any]) -> list[Tensor | None]:
        """Per item (cells,) bool, the cells that become tokens; None for all."""
        mask = arguments.get("video_compression_mask") if modality == "video" else None
        return [None] * len(sizes) if mask is None else list(mask.bool().split(sizes))
