"""Adapter for model types without one of their own; used where the user asks for it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import listed
from ..tokens import Segment
from .base import Adapter, Layout, language_model_of
from .towers.base import Tower


class GenericAdapter(Adapter):
    """Any model with `get_image_features` and placeholders, by `vtoken.patch(model, ..., adapter="generic")`.

    The vision tower is not read and no token has a place in the picture, so that strategies that read
    attention, tower states or the grid are refused. Every entry of `pooler_output` is an image; where the
    features of several images stand in one tensor, `image_grid_thw` or the number of images in the pixels
    says where each begins. A frame of a video is one row of the features of its pixels or of its
    `video_grid_thw`.

    Raises:
        ValueError: for a model without `get_image_features`, `get_decoder` or the id of a placeholder.
    """

    has_grid = False
    advice = "the generic adapter does not fit this model, write one as docs/adding-a-model.md shows"

    def __init__(self, model: nn.Module) -> None:
        base: Any = model.base_model
        kind = model.config.model_type  # type: ignore[union-attr]
        modalities = (m for m in ("image", "video") if hasattr(base, f"get_{m}_features"))
        self.modalities = tuple(modalities)  # type: ignore[misc]
        if lacking := self.missing(model):
            raise ValueError(
                f"The generic adapter needs {listed(lacking)}, which this {kind} model does not have:"
                " docs/adding-a-model.md shows how to write an adapter."
            )
        super().__init__(model)

    @staticmethod
    def missing(model: Any) -> list[str]:
        """What keeps this adapter from serving a model, in words."""
        base = model.base_model
        lacking = [n for n in ("get_image_features", "get_input_embeddings") if not hasattr(base, n)]
        decoder = language_model_of(model) if hasattr(model, "get_decoder") else base
        takes = inspect.signature(decoder.forward).parameters
        if decoder is base or "inputs_embeds" not in takes:
            lacking.append("a language model of its own that reads embeddings")
        if not hasattr(base, "get_placeholder_mask") and token_id(model.config, "image") is None:
            lacking.append("config.image_token_id")
        return lacking

    def make_towers(self) -> dict[str, Tower]:
        return {}

    def find_placeholders(self, input_ids: Tensor) -> dict[str, Tensor]:
        ids = {m: token_id(self.config, m) for m in self.modalities}
        return {
            m: torch.zeros_like(input_ids, dtype=torch.bool) if i is None else input_ids == i
            for m, i in ids.items()
        }

    def split_features(self, modality: str, output: Any, arguments: dict[str, Any]) -> list[Tensor]:
        features = output.pooler_output
        if not isinstance(features, Tensor) or (modality == "image" and features.ndim > 2):
            return super().split_features(modality, output, arguments)
        flat = features.flatten(0, -2)
        return list(flat.split(self._lengths(modality, len(flat), arguments)))

    def _lengths(self, modality: str, total: int, arguments: dict[str, Any]) -> list[int]:
        """The tokens of every image or video of a call."""
        grid = arguments.get(f"{modality}_grid_thw")
        pixels = arguments[self.pixel_argument(arguments)]
        shares = [1] * len(pixels) if grid is None else grid.prod(-1).tolist()
        if not shares or (total % sum(shares) and sum(shares) % total):
            raise NotImplementedError(
                f"The generic adapter cannot tell which of the {total} {modality} tokens belong to which of"
                f" {len(shares)} {modality}s: give one {modality} per call, or write an adapter as"
                " docs/adding-a-model.md shows."
            )
        return [share * total // sum(shares) for share in shares]

    def frames(self, modality: str, arguments: dict[str, Any]) -> list[int]:
        grid = arguments.get(f"{modality}_grid_thw")
        return super().frames(modality, arguments) if grid is None else grid[:, 0].tolist()

    def layouts(self, modality: str, features: list[Tensor], arguments: dict[str, Any]) -> list[Layout]:
        frames = self.frames(modality, arguments) if modality == "video" else [1] * len(features)
        if len(frames) != len(features):
            raise NotImplementedError(
                f"The generic adapter found {len(features)} videos in the features and {len(frames)} in the"
                " pixels: write an adapter as docs/adding-a-model.md shows."
            )
        out = []
        for f, t in zip(features, frames, strict=True):
            t = t if t and len(f) % t == 0 else 1  # separators or frames of several sizes: one segment
            kind = "frame" if modality == "video" else "image"
            out.append(Layout.plain([Segment(kind, (1, len(f) // t))] * t, f.device))
        return out


def token_id(config: Any, modality: str) -> int | None:
    """The id of a modality's placeholder; that of images where a model has one for both."""
    names = (f"{modality}_token_id", f"{modality}_token_index", "image_token_id", "image_token_index")
    found = (getattr(config, name, None) for name in names)
    return next((int(i) for i in found if i is not None), None)
