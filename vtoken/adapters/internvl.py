"""InternVL and Qianfan-OCR: square tiles, pixel shuffle, a tower with a class token."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import Tensor

from ..tokens import VisualTokens
from .base import Adapter, Layout, feature_layer_of, square
from .registry import register_adapter
from .tiles import join_tiles, runs_of, shuffled_pool
from .towers.base import Tower
from .towers.intern import InternTower


@register_adapter
class InternVLAdapter(Adapter):
    """`InternVLForConditionalGeneration`, `QianfanOCRForConditionalGeneration`.

    An unbroken run of placeholders is one image (or one frame of a video, which the model reads as images),
    with its tiles as segments. The model does not know the places of the tiles on the image: no segment has a
    place.
    """

    model_types: ClassVar[tuple[str, ...]] = ("internvl", "qianfan_ocr")

    def make_towers(self) -> dict[str, Tower]:
        tower = self.base.vision_tower
        if tower.config.model_type not in ("internvl_vision", "qianfan_ocr_vision"):
            return {}
        layer = feature_layer_of(self.config, tower.config.num_hidden_layers)
        return {"image": InternTower(tower, layer, functools.partial(shuffled_pool, self._shuffle))}

    def _shuffle(self, patches: Tensor) -> Tensor:
        side = square(patches.shape[1])
        return self.base.pixel_shuffle(patches.unflatten(1, side), scale_factor=self.config.downsample_ratio)

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        return [Layout.square(f) for f in features]

    def join(self, items: list[VisualTokens], input_ids: Tensor | None, places: Tensor) -> list[VisualTokens]:
        size, at, images = len(items[0]), 0, []
        runs = runs_of(places)
        if any(length % size for _, length in runs):
            return items
        for _, length in runs:
            tiles = items[at : at + length // size]
            images.append(join_tiles(tiles, [t.segments[0] for t in tiles], range(len(tiles))))
            at += len(tiles)
        return images
