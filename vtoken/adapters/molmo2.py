"""Molmo2: a view of the whole image and overlapping crops joined to one grid, patches pooled by attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..tokens import Segment
from .base import Adapter, Layout
from .registry import register_adapter
from .towers.base import Tower


@register_adapter
class Molmo2Adapter(Adapter):
    """`Molmo2ForConditionalGeneration`. Column marks between rows are text and always stay.

    The processor cuts crops that overlap and leaves out the patches of the overlap: their cells are one grid
    over the whole image. Images and videos share a placeholder, and a batch has one of both. The LLM reads
    features and the embedding of the placeholder, added.
    """

    model_types = ("molmo2",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    def make_towers(self) -> dict[str, Tower]:
        return {}  # the processor says which patches make a token, and the tower is not told

    def split_features(self, modality: str, output: Any, arguments: dict[str, Any]) -> list[Tensor]:
        embed, features = self.base.get_input_embeddings(), output.pooler_output
        added = embed(torch.tensor(self.config.image_token_id, device=embed.weight.device))
        return [f + added.to(f) for f in features]

    def frames(self, modality: str, arguments: dict[str, Any]) -> list[int]:
        return arguments["video_grids"][:, 0].tolist() if modality == "video" else []

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        out = []
        for grid, f in zip(arguments[f"{modality}_grids"].tolist(), features, strict=True):
            if modality == "video":
                segments = [Segment("frame", (grid[1], grid[2]))] * grid[0]
            else:
                segments = [Segment("thumbnail", (grid[0], grid[1])), Segment("crop", (grid[2], grid[3]))]
            out.append(Layout.plain(segments, f.device))
        return out
