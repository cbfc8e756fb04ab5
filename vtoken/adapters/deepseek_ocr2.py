"""DeepSeek-OCR 2: SAM's patches, read by learned queries in an order of their own; tiles, then the whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ..tokens import Segment
from .base import Adapter, Layout
from .registry import register_adapter
from .towers.base import Tower


@register_adapter
class DeepseekOcr2Adapter(Adapter):
    """`DeepseekOcr2ForConditionalGeneration`: the queries of every tile and of the whole image, a separator.

    A visual token is a query: dropping it drops one of the summaries of a picture, and no part of it.
    """

    model_types = ("deepseek_ocr2",)
    has_grid = False

    def make_towers(self) -> dict[str, Tower]:
        return {}  # attention of patches, which are no tokens

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        tiles = arguments.get("num_local_patches")
        tiles = [0] * len(features) if tiles is None else [int(n) for n in tiles]
        tower, out = self.base.vision_tower, []
        few, many = (q.num_embeddings for q in (tower.query_768_resolution, tower.query_1024_resolution))
        for f, count in zip(features, tiles, strict=True):
            fitting = [
                (a, b) for a, b in ((few, few), (few, many), (many, many)) if a * count + b == len(f) - 1
            ]
            tile, whole = fitting[0]
            layout = Layout.plain([Segment("queries", (1, n)) for n in [*[tile] * count, whole]], f.device)
            out.append(Layout(layout.segments, pad(layout.cells, (0, 1), value=-1)))
        return out
