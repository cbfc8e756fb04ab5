"""Idefics2, Idefics3, SmolVLM: tiles with text tags between, pixel shuffle, towers with padding masks."""

from __future__ import annotations

import functools
import itertools
from typing import Any, ClassVar

from torch import Tensor

from ..tokens import Segment, VisualTokens
from .base import Adapter, Layout
from .registry import register_adapter
from .tiles import crop_at, join_tiles, runs_of, shuffled_pool
from .towers.base import Tower
from .towers.idefics import IdeficsTower


@register_adapter
class IdeficsAdapter(Adapter):
    """`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`.

    The processors write `R x C` tiles row by row and the whole image after them: a tag before each tile, text
    between rows, and the same tag before every whole image. The frames of a video are images to the model.
    """

    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")
    pixel_arguments = ("pixel_values", "image_hidden_states")
    prompt_arguments = ("inputs_embeds",)

    def make_towers(self) -> dict[str, Tower]:
        tower, connector = self.base.vision_model, self.base.connector
        shuffle = functools.partial(connector.pixel_shuffle, scale_factor=connector.scale_factor)
        return {
            "image": IdeficsTower(
                tower, len(tower.encoder.layers) - 1, functools.partial(shuffled_pool, shuffle)
            )
        }

    def split_features(self, modality: str, output: Any, arguments: dict[str, Any]) -> list[Tensor]:
        size = self.base.image_seq_len
        features = output.pooler_output
        if isinstance(features, Tensor):
            features = [features.flatten(0, -2)]
        return [tile for sample in features if len(sample) for tile in sample.split(size)]

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        self._check(arguments)
        return [Layout.square(f) for f in features]

    def _check(self, arguments: dict[str, Any]) -> None:
        """Raise NotImplementedError for a prompt in which image tokens cannot be found."""
        if "inputs_embeds" in arguments and not hasattr(self.base, "get_placeholder_mask"):
            raise NotImplementedError(
                f"{self.config.model_type} finds image tokens by their ids, found a prompt of embeddings:"
                " pass input_ids."
            )

    def join(self, items: list[VisualTokens], input_ids: Tensor | None, places: Tensor) -> list[VisualTokens]:
        runs = runs_of(places)
        if input_ids is None or len(runs) != len(items) or any(start == 0 for start, _ in runs):
            return items
        tags = input_ids[[start - 1 for start, _ in runs]].tolist()
        images, first = [], 0
        for i, tag in enumerate(tags):
            if tag == tags[-1]:
                images += self._image(items[first : i + 1], runs[first : i + 1])
                first = i + 1
        return images

    @staticmethod
    def _image(tiles: list[VisualTokens], runs: list[tuple[int, int]]) -> list[VisualTokens]:
        """The tiles of one image, which end with the whole image; strategies see that thumbnail first."""
        gaps = [b[0] - a[0] - a[1] for a, b in itertools.pairwise(runs)]
        if not gaps:
            return tiles
        # within a row the gap is the fake token and the tag, after a row it also has a line break
        ends = [i for i, gap in enumerate(gaps) if gap > 2 or i == len(gaps) - 1]
        columns = ends[0] + 1
        rows = len(gaps) // columns
        if ends != [columns * (r + 1) - 1 for r in range(rows)]:
            return tiles
        grid = tiles[0].segments[0].grid
        places = itertools.product(range(rows), range(columns))
        segments = [Segment("thumbnail", grid), *(crop_at(r, c, rows, columns, grid) for r, c in places)]
        return [join_tiles(tiles, segments, [len(gaps), *range(len(gaps))])]


@register_adapter
class Idefics2Adapter(IdeficsAdapter):
    """`Idefics2ForConditionalGeneration`: every crop of an image, and the whole, is an image to the model.

    A visual token is a learned query of the resampler: dropping it drops one of the summaries of a picture,
    and no part of it.
    """

    model_types = ("idefics2",)
    has_grid = False

    def make_towers(self) -> dict[str, Tower]:
        return {}  # attention of patches, which are no tokens

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        self._check(arguments)
        return [Layout.queries(len(f), f.device) for f in features]

    def join(self, items: list[VisualTokens], input_ids: Tensor | None, places: Tensor) -> list[VisualTokens]:
        return items
