"""ModernVBERT: SigLIP tiles and pixel shuffle as in Idefics3, an encoder in place of the LLM."""

from __future__ import annotations

import functools
from typing import ClassVar

from .base import feature_layer_of
from .idefics import IdeficsAdapter
from .registry import register_adapter
from .tiles import shuffled_pool
from .towers.base import Tower
from .towers.clip import SiglipTower


@register_adapter
class ModernVBertAdapter(IdeficsAdapter):
    """`ModernVBertModel`, `ModernVBertForMaskedLM` and its classifiers: attention in both directions."""

    model_types: ClassVar[tuple[str, ...]] = ("modernvbert",)
    caches = False

    def make_towers(self) -> dict[str, Tower]:
        tower, connector = self.base.vision_model, self.base.connector
        if tower.config.model_type != "siglip_vision_model":
            return {}
        shuffle = functools.partial(
            connector.pixel_shuffle, pixel_shuffle_factor=connector.pixel_shuffle_factor
        )
        layer = feature_layer_of(self.config, tower.config.num_hidden_layers)
        return {"image": SiglipTower(tower, layer, functools.partial(shuffled_pool, shuffle))}
