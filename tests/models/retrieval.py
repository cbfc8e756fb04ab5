"""Retrieval models on the bodies of the other files: an embedding per token, no `generate`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as tf
from torch import Tensor

from . import qwen
from .common import IMG, LM, VIT, Family, Item, randomize
from .siglip import idefics_collate, idefics_image, image, paligemma


@dataclass(frozen=True)
class Retriever(Family):
    """A family without `generate`; the names of its body's config, and of its tokens, are in `vlm_config`."""

    def build(self, attn: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0):
        config, cls = self.config(), getattr(tf, self.architecture)
        return randomize(cls._from_config(config, attn_implementation=attn), seed).to(dtype)


def colpali():
    return tf.ColPaliConfig(vlm_config=paligemma(), embedding_dim=16)


def colqwen2():
    return tf.ColQwen2Config(vlm_config=qwen.qwen2_vl(), embedding_dim=16)


def colqwen2_5():
    return tf.ColQwen2Config(vlm_config=qwen.qwen2_5_vl(), embedding_dim=16)


def colqwen2_collate(rows: list[list[Item]]) -> dict[str, Tensor]:
    """(images, most patches, channels), as the processor pads them."""
    items = [item.tensors for row in rows for item in row]
    if not items:
        return {}
    pixels = torch.nn.utils.rnn.pad_sequence([t["pixel_values"] for t in items], batch_first=True)
    return dict(pixel_values=pixels, image_grid_thw=torch.cat([t["image_grid_thw"] for t in items]))


def modernvbert():
    text = {k: v for k, v in LM.items() if k != "num_key_value_heads"}
    ids = dict(cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2, local_attention=4096)
    return tf.ModernVBertConfig(
        vision_config=tf.SiglipVisionConfig(**VIT, image_size=56, patch_size=7, vision_use_head=False),
        text_config=tf.ModernBertConfig(**text, **ids),
        image_token_id=IMG,
        pixel_shuffle_factor=2,
    )


def colmodernvbert():
    return tf.ColModernVBertConfig(vlm_config=modernvbert(), embedding_dim=16)


def tiles(rows: list[list[Item]]) -> dict[str, Tensor]:
    return idefics_collate(rows) if any(rows) else {}


ROWS = [
    Retriever(
        "colpali",
        "image",
        "ColPaliForRetrieval",
        colpali,
        image,
        extra=lambda ids, mask: dict(token_type_ids=torch.zeros_like(ids)),
        images_first=True,
    ),
    Retriever("colqwen2", "image", "ColQwen2ForRetrieval", colqwen2, qwen.image, colqwen2_collate),
    Retriever("colqwen2_5", "image", "ColQwen2ForRetrieval", colqwen2_5, qwen.image, colqwen2_collate),
    Retriever("colmodernvbert", "image", "ColModernVBertForRetrieval", colmodernvbert, idefics_image, tiles),
]
RETRIEVERS = {family.name: family for family in ROWS if family.runs}
