"""Aya Vision and Command A Vision: SigLIP over square tiles, pixel shuffle."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import Tensor

from ..tokens import VisualTokens
from .base import Adapter, Layout, feature_layer_of
from .registry import register_adapter
from .tiles import join_until, runs_of, shuffled_pool
from .towers.base import Tower
from .towers.clip import SiglipTower


@register_adapter
class AyaVisionAdapter(Adapter):
    """`AyaVisionForConditionalGeneration`.

    A tag stands before each tile, the same one before every view of a whole image, which comes last. The
    model does not know the places of the tiles on the image: no segment has a place.
    """

    model_types: ClassVar[tuple[str, ...]] = ("aya_vision",)

    def make_towers(self) -> dict[str, Tower]:
        tower = self.base.vision_tower
        if tower.config.model_type != "siglip_vision_model":
            return {}
        layer = feature_layer_of(self.config, tower.config.num_hidden_layers)
        pool = functools.partial(shuffled_pool, self.base.multi_modal_projector.pixel_shuffle)
        return {"image": SiglipTower(tower, layer, pool)}

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        return [Layout.square(f) for f in features]

    def join(self, items: list[VisualTokens], input_ids: Tensor | None, places: Tensor) -> list[VisualTokens]:
        runs = runs_of(places)
        if input_ids is None or len(runs) != len(items) or any(start == 0 for start, _ in runs):
            return items
        tags = input_ids[[start - 1 for start, _ in runs]].tolist()
        return join_until(items, [tag == tags[-1] for tag in tags])


@register_adapter
class Cohere2VisionAdapter(AyaVisionAdapter):
    """`Cohere2VisionForConditionalGeneration`: between the tiles of an image is one line break."""

    model_types: ClassVar[tuple[str, ...]] = ("cohere2_vision",)

    def join(self, items: list[VisualTokens], input_ids: Tensor | None, places: Tensor) -> list[VisualTokens]:
        runs = runs_of(places)
        if len(runs) != len(items):
            return items
        starts = [start for start, _ in runs[1:]]
        together = [sum(run) + 1 == start for run, start in zip(runs, starts, strict=False)]
        return join_until(items, [not same for same in [*together, False]])
