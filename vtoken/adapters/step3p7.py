"""Step 3.7: crops row by row, then the whole image, from a tower with convolutions after its layers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..tokens import Segment, VisualTokens
from .base import Adapter, Layout
from .registry import register_adapter
from .tiles import crop_at, runs_of
from .towers.base import Tower


@register_adapter
class Step3p7Adapter(Adapter):
    """`Step3p7ForConditionalGeneration`.

    The processor writes two tokens between crops of one row and three between rows. Each token gathers four
    by four patches by convolutions, whose sums leave the tower's attention without a cell to be read for.
    """

    model_types = ("step3p7",)

    def make_towers(self) -> dict[str, Tower]:
        return {}

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        whole, crops = (self._side(arguments.get(name)) for name in ("pixel_values", "pixel_values_local"))
        counts, out = arguments.get("num_local_patches"), []
        for f, n in zip(features, [0] * len(features) if counts is None else counts, strict=True):
            kind = "thumbnail" if int(n) else "image"
            segments = [Segment(kind, (whole, whole)), *[Segment("crop", (crops, crops))] * int(n)]
            # the tokens of the whole image, the first segment, come last
            out.append(Layout(segments, torch.arange(len(f), device=f.device).roll(-segments[0].size)))
        return out

    def _side(self, pixels: Tensor | None) -> int:
        """Cells along a side of square pixels (..., H, W), after two convolutions of stride 2."""
        patches = 0 if pixels is None else pixels.shape[-1] // int(self.config.vision_config.patch_size)
        return (patches + 3) // 4

    def join(self, items: list[VisualTokens], input_ids: Tensor | None, places: Tensor) -> list[VisualTokens]:
        runs, out = runs_of(places), []
        if len(runs) != sum(len(item.segments) for item in items):
            return items  # a prompt without the marks of the processor
        for item in items:
            count = len(item.segments) - 1
            mine, runs = runs[:count], runs[count + 1 :]
            gaps = [b - a - n for (a, n), (b, _) in pairwise(mine)]
            columns = next((i + 1 for i, gap in enumerate(gaps) if gap > min(gaps)), count)
            whole, *crops = item.segments
            for i, crop in enumerate(crops):
                crops[i] = crop_at(*divmod(i, columns), count // columns, columns, crop.grid)
            out.append(replace(item, segments=(whole, *crops)))
        return out
