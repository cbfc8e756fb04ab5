"""MiniCPM-V 4.6, 4.7, MiniCPM-OCR: slices of images, frames of videos, packed patches, Qwen3.5's LLM."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

from torch import Tensor

from ..tokens import Segment, VisualTokens
from .base import Adapter, Layout
from .registry import register_adapter
from .tiles import crop_at, join_tiles, runs_of
from .towers.base import Tower


@register_adapter
class MiniCpmVAdapter(Adapter):
    """`MiniCPMV4_6...`, `MiniCPMV4_7...` and `MiniCPMOcrForConditionalGeneration`.

    The processor writes the view of the whole picture, then its slices row by row: a mark before and after
    each, another mark before slices, a line break between their rows. Frames of a video follow one another.
    """

    model_types = ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    prompt_arguments: ClassVar[tuple[str, ...]] = ("downsample_mode",)

    def make_towers(self) -> dict[str, Tower]:
        return {}  # patches are merged between two layers: attention of one layer is not that of another

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        mode = arguments.get("downsample_mode") or self.config.downsample_mode
        side = 2**self.config.merger_times * (1 if mode == "4x" else 2)
        sizes = arguments["target_sizes" if modality == "image" else "target_sizes_videos"].tolist()
        return [
            Layout.plain([Segment("image", (h // side, w // side))], f.device)
            for (h, w), f in zip(sizes, features, strict=True)
        ]

    def join(self, items: list[VisualTokens], input_ids: Tensor | None, places: Tensor) -> list[VisualTokens]:
        runs = runs_of(places)
        if input_ids is None or len(runs) != len(items) or runs[0][0] == 0:
            return items
        tags = input_ids[[start - 1 for start, _ in runs]].tolist()
        gaps = [b[0] - a[0] - a[1] for a, b in itertools.pairwise(runs)]
        whole = [i for i, tag in enumerate(tags) if tag == tags[0]]  # before the view of a whole picture
        segments = [
            self._segments(items[a:b], gaps[a : b - 1]) for a, b in itertools.pairwise([*whole, len(items)])
        ]
        ends = [*whole[1:], len(items)]
        if items[0].modality == "video":  # two marks between its frames
            ends = [end for end in ends if end == len(items) or gaps[end - 1] > 2]
        out, flat = [], list(itertools.chain(*segments))
        for a, b in itertools.pairwise([0, *ends]):
            out.append(join_tiles(items[a:b], flat[a:b], range(b - a)))
        return out

    @staticmethod
    def _segments(tiles: list[VisualTokens], gaps: list[int]) -> list[Segment]:
        """The view of the whole picture and its slices; `gaps` are the tokens between them."""
        video, count = tiles[0].modality == "video", len(tiles) - 1
        kind = "frame" if video else "thumbnail" if count else "image"
        out = [Segment(kind, tiles[0].segments[0].grid)]
        columns = next((i for i, gap in enumerate(gaps[1:], 1) if gap > 2), count)
        rows = -(-count // columns) if count else 0
        for i, tile in enumerate(tiles[1:]):
            out.append(crop_at(*divmod(i, columns), rows, columns, tile.segments[0].grid))
        return out
