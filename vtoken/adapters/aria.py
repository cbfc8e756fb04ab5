"""Aria: an Idefics3 tower over square tiles, whose patches are read by learned queries."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Layout
from .internvl import InternVLAdapter
from .registry import register_adapter
from .towers.base import Tower


@register_adapter
class AriaAdapter(InternVLAdapter):
    """`AriaForConditionalGeneration`: a run of placeholders is one image with its tiles.

    A visual token is a query: dropping it drops one of the summaries of a tile, and no part of the picture.
    """

    model_types = ("aria",)
    has_grid = False

    def make_towers(self) -> dict[str, Tower]:
        return {}  # attention of patches, which are no tokens

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        return [Layout.queries(len(f), f.device) for f in features]
