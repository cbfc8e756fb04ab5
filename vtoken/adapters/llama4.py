"""Llama 4: tiles with separators between them, a tower with a class token, chunked attention in the LLM."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from ..tokens import Segment, VisualTokens
from .base import Adapter, Layout
from .registry import register_adapter
from .tiles import crop_at, join_tiles, runs_of
from .towers.base import Tower


@register_adapter
class Llama4Adapter(Adapter):
    """`Llama4ForConditionalGeneration`.

    The processor writes tiles row by row, one token between two of them, a second kind of token after a row,
    then a tag and the whole image; an image of one tile is its tag and itself. The LLM's chunks count the
    tokens that it reads.
    """

    model_types = ("llama4",)
    features_field = "last_hidden_state"

    def make_towers(self) -> dict[str, Tower]:
        return {}  # complex rotary embedding and a class token at the end, whose attention is not read

    def split_features(self, modality: str, output: Any, arguments: dict[str, Any]) -> list[Tensor]:
        tiles = output.last_hidden_state
        return list(self.base.multi_modal_projector(tiles.flatten(0, -2)).view(*tiles.shape[:-1], -1))

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        return [Layout.square(f) for f in features]

    def join(self, items: list[VisualTokens], input_ids: Tensor | None, places: Tensor) -> list[VisualTokens]:
        runs = runs_of(places)
        if input_ids is None or len(runs) != len(items) or runs[0][0] == 0:
            return items
        ids, images, first = input_ids.tolist(), [], 0
        for i, (start, _) in enumerate(runs):
            if ids[start - 1] == ids[runs[-1][0] - 1]:  # the tag of a whole image
                images += self._image(items[first : i + 1], [s for s, _ in runs[first : i + 1]], ids)
                first = i + 1
        return images

    @staticmethod
    def _image(tiles: list[VisualTokens], starts: list[int], ids: list[int]) -> list[VisualTokens]:
        """The tiles of one image, which end with the whole image; strategies see that thumbnail first."""
        count, row_end = len(tiles) - 1, ids[starts[-1] - 2]
        columns = next((i for i in range(1, count) if ids[starts[i] - 1] == row_end), count)
        if not count or count % columns:
            return tiles
        grid, rows = tiles[0].segments[0].grid, count // columns
        places = itertools.product(range(rows), range(columns))
        segments = [Segment("thumbnail", grid), *(crop_at(r, c, rows, columns, grid) for r, c in places)]
        return [join_tiles(tiles, segments, [count, *range(count)])]
