"""Cohere's families: SigLIP tiles with pixel shuffle, an LLM whose rope turns pairs, in some layers only."""

from __future__ import annotations

import transformers as tf

from .common import BREAK, END, IMG, LM, ROW, START, Family, Item, pixels
from .siglip import TILES, siglip

GLOBAL = ROW + 9  # the tag of a whole image
ALIGN = dict(downsample_factor=2, alignment_intermediate_size=48)


def cohere(cls: str, **extra):
    def config():
        lm = tf.Cohere2Config(**LM, head_dim=8, sliding_window=4096)
        return getattr(tf, cls)(
            vision_config=siglip(56), text_config=lm, image_token_id=IMG, **ALIGN, **extra
        )

    return config


def aya_image(i: int, n: int) -> Item:
    tags = [*range(ROW, ROW + TILES[i] - 1), GLOBAL]
    ids = [token for tag in tags for token in [tag, *[IMG] * 16]]
    return Item([START, *ids, END], dict(pixel_values=pixels(TILES[i], 3, 56, 56, seed=i)))


def cohere2_image(i: int, n: int) -> Item:
    ids = [*[IMG] * 16, BREAK] * TILES[i]
    return Item([START, *ids, END], dict(pixel_values=pixels(TILES[i], 3, 56, 56, seed=i)))


aya = cohere("AyaVisionConfig", vision_feature_layer=-1, vision_feature_select_strategy="full")

FAMILIES = [
    Family("aya_vision", "image", "AyaVisionForConditionalGeneration", aya, aya_image, inside=False),
    Family(
        "cohere2_vision",
        "image",
        "Cohere2VisionForConditionalGeneration",
        cohere("Cohere2VisionConfig"),
        cohere2_image,
        inside=False,
    ),
]
