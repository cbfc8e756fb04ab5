"""Grids, token order and vision towers of a model, from its configuration alone."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...adapters.base import Adapter, Layout
from ...adapters.registry import adapter_for
from .positions import line_positions


class Geometry:
    """What vtoken's adapter for transformers knows of a model, taken from one without weights.

    Args:
        config: of the model; it stays as it is.

    Attributes:
        adapter: that of the model without weights.
        apart: modalities whose segments stand apart in the prompt, with text between them.
        alone: those of them whose segments reach the strategy one by one, as images.
    """

    apart: ClassVar[tuple[str, ...]] = ()
    alone: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
        self.adapter: Adapter = adapter_for(empty)

    def layouts(self, modality: str, count: int, arguments: dict[str, Any]) -> list[Layout]:
        """Segments and cells of `count` images or videos, on the CPU.

        Args:
            arguments: the outputs of the processor by name, such as `image_sizes` and `image_grid_thw`.
        """
        with torch.device("cpu"):
            sizes = self.sizes(modality, count, arguments)
            return self.adapter.layouts(modality, [torch.empty(n) for n in sizes], arguments)

    def sizes(self, modality: str, count: int, arguments: dict[str, Any]) -> list[int]:
        """Features per image or video, for adapters that read the geometry off them; 0 for others."""
        return [0] * count

    def positions(self, modality: str, layouts: list[Layout], arguments: dict[str, Any]) -> list[Tensor]:
        """Per image or video (3, n) int64, its tokens' positions from its start, or from their segment's."""
        runs = [
            [s.fed for s in layout.segments] if modality in self.apart else [len(layout.cells)]
            for layout in layouts
        ]
        return [torch.cat([line_positions(n) for n in sizes], 1) for sizes in runs]

    def seen_as(self, modality: str) -> str:
        """The modality under which the strategy meets what came as `modality`."""
        return "image" if modality in self.alone else modality
