"""Ovis2: an AIMv2 tower over square tiles, whose values are mixtures of a table of visual embeddings."""

from __future__ import annotations

import itertools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..tokens import Segment, VisualTokens
from .base import Adapter, Layout, square
from .registry import register_adapter
from .tiles import crop_at, join_tiles, runs_of
from .towers.base import Tower


class Ovis2Tower(Tower):
    """AIMv2 vision transformer of Ovis2: patches only."""

    rows_are_frames = True

    def find_layers(self) -> list[nn.Module]:
        return list(self.module.transformer.encoder.layers)  # type: ignore[union-attr, arg-type]

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].attention  # type: ignore[return-value]


@register_adapter
class Ovis2Adapter(Adapter):
    """`Ovis2ForConditionalGeneration`.

    The processor writes the view of the whole image first, then `R x C` tiles row by row, with indicator
    tokens between them that tell rows from columns.
    """

    model_types = ("ovis2",)

    def make_towers(self) -> dict[str, Tower]:
        tower = self.base.vision_tower
        return {"image": Ovis2Tower(tower, tower.config.num_hidden_layers - 1, self._pool)}

    def _pool(self, value: Tensor) -> Tensor:
        """(..., patches) -> (..., cells); cells at the border of an odd grid have fewer patches."""
        grid = value.reshape(-1, 1, *square(value.shape[-1]))
        pooled = F.avg_pool2d(grid, self.config.vision_config.hidden_stride, ceil_mode=True)
        return pooled.reshape(*value.shape[:-1], -1)

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        return [Layout.square(f) for f in features]

    def join(self, items: list[VisualTokens], input_ids: Tensor | None, places: Tensor) -> list[VisualTokens]:
        runs = runs_of(places)
        if input_ids is None or len(runs) != len(items) or sum(runs[-1]) >= len(input_ids):
            return items
        start, _, _, row, _ = self.config.visual_indicator_token_ids
        ids = input_ids.tolist()
        first = [i for i, (at, _) in enumerate(runs) if at > 0 and ids[at - 1] == start]
        if first[:1] != [0]:
            return items
        images = []
        for a, b in zip(first, [*first[1:], len(items)], strict=True):
            rows = 1 + sum(ids[sum(run)] == row for run in runs[a:b])
            images.append(self._image(items[a:b], rows))
        return images

    @staticmethod
    def _image(tiles: list[VisualTokens], rows: int) -> VisualTokens:
        grid, columns = tiles[0].segments[0].grid, (len(tiles) - 1) // rows
        if len(tiles) == 1 or rows * columns != len(tiles) - 1:
            return join_tiles(tiles, [t.segments[0] for t in tiles], range(len(tiles)))
        places = itertools.product(range(rows), range(columns))
        segments = [Segment("thumbnail", grid), *(crop_at(r, c, rows, columns, grid) for r, c in places)]
        return join_tiles(tiles, segments, range(len(tiles)))
