"""Retrieval models of ColPali's kind: a body of another family, and a head that embeds every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Adapter
from .modernvbert import ModernVBertAdapter
from .paligemma import PaliGemmaAdapter
from .qwen_vl import QwenVLAdapter
from .registry import register_adapter


class RetrievalAdapter(Adapter):
    """Their embeddings are those of the tokens that the body read: fewer per page."""

    answers = False
    short_outputs = True

    @classmethod
    def config_of(cls, model: Any) -> Any:
        return model.config.vlm_config


@register_adapter
class ColPaliAdapter(RetrievalAdapter, PaliGemmaAdapter):
    """`ColPaliForRetrieval`."""

    model_types = ("colpali",)


@register_adapter
class ColModernVBertAdapter(RetrievalAdapter, ModernVBertAdapter):
    """`ColModernVBertForRetrieval`."""

    model_types = ("colmodernvbert",)


@register_adapter
class ColQwen2Adapter(RetrievalAdapter, QwenVLAdapter):
    """`ColQwen2ForRetrieval`, whose head encodes images itself, padded to one number of patches, and merges
    them into the embeddings: done here by `get_image_features`.
    """

    model_types = ("colqwen2",)
    modalities = ("image",)

    def merge(self, given: dict[str, Any]) -> dict[str, Any]:
        pixels: Any = given.get("pixel_values")
        grids: Any = given.get("image_grid_thw")
        if pixels is None or given.get("inputs_embeds") is not None:
            return given
        ids, embeds = given["input_ids"], self.base.get_input_embeddings()(given["input_ids"])
        if pixels.ndim == 3:
            patches = torch.arange(pixels.shape[1], device=pixels.device)
            pixels = pixels[patches < (grids[:, 1] * grids[:, 2]).to(pixels.device)[:, None]]
        features = torch.cat(list(self.base.get_image_features(pixels, grids).pooler_output))
        places = (ids == self.config.image_token_id)[..., None]
        merged: Tensor = embeds.masked_scatter(places, features.to(embeds))
        return given | {"inputs_embeds": merged, "pixel_values": None, "image_grid_thw": None}
