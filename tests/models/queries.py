"""Families whose visual tokens are learned queries: Aria, Idefics2, DeepSeek-OCR 2."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

from .common import END, IMG, LM, START, VIT, Family, Item, concatenate, pixels
from .ocr import SAM
from .siglip import TILES, idefics_collate

QUERIES = 12


def aria():
    vision = tf.Idefics3VisionConfig(**VIT, image_size=56, patch_size=7)
    lm = tf.AriaTextConfig(**LM, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    return tf.AriaConfig(
        vision_config=vision,
        text_config=lm,
        image_token_index=IMG,
        projector_patch_to_query_dict={64: QUERIES},
    )


def aria_image(i: int, n: int) -> Item:
    values = pixels(TILES[i], 3, 56, 56, seed=i)
    mask = torch.ones(TILES[i], 56, 56, dtype=torch.bool)
    mask[-1, :, 42:] = False  # padding of the last tile
    return Item([START, *[IMG] * (QUERIES * TILES[i]), END], dict(pixel_values=values, pixel_mask=mask))


def idefics2():
    vision = tf.Idefics2VisionConfig(**VIT, image_size=56, patch_size=7)
    resampler = dict(hidden_size=32, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=8)
    perceiver = tf.Idefics2PerceiverConfig(**resampler, num_key_value_heads=2, resampler_n_latents=QUERIES)
    lm = tf.MistralConfig(**LM, sliding_window=None)
    return tf.Idefics2Config(
        vision_config=vision, perceiver_config=perceiver, text_config=lm, image_token_id=IMG
    )


def idefics2_image(i: int, n: int) -> Item:
    return Item([START, *[IMG] * QUERIES, START], dict(pixel_values=pixels(1, 3, 56, 56, seed=i)))


# -- DeepSeek-OCR 2 ------------------------------------------------------------------------------------------
MANY = 144  # queries of a picture of up to 12 x 12 patches, fixed in the model


def deepseek_ocr2():
    sam = dict(**SAM, downsample_channels=[16, 32], image_size=112, patch_size=7, window_size=4)
    encoder = dict(**VIT, num_key_value_heads=4)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=24)
    kinds = ["dense", "sparse", "sparse", "sparse"]
    lm = LM | dict(num_key_value_heads=4)
    return tf.DeepseekOcr2Config(
        vision_config=dict(sam_config=sam | dict(global_attn_indexes=[1, 3]), encoder_config=encoder),
        text_config=dict(**lm, **experts, mlp_layer_types=kinds),
        image_token_id=IMG,
    )


def ocr2_image(i: int, n: int) -> Item:
    tiles = [0, 2, 0][i]
    tensors = dict(pixel_values=pixels(1, 3, 112, 112, seed=i), num_local_patches=torch.tensor([tiles]))
    tensors["pixel_values_local"] = pixels(tiles, 3, 112, 112, seed=50 + i)
    return Item([START, *[IMG] * (MANY * (tiles + 1) + 1), END], tensors)


def ocr2_collate(rows: list[list[Item]]) -> dict[str, Tensor]:
    """Without tiles there are no pixels of tiles."""
    made = concatenate(rows)
    return {k: v for k, v in made.items() if k != "pixel_values_local" or len(v)}


FAMILIES = [
    Family("aria", "image", "AriaForConditionalGeneration", aria, aria_image),
    Family(
        "idefics2", "image", "Idefics2ForConditionalGeneration", idefics2, idefics2_image, idefics_collate
    ),
    Family(
        "deepseek_ocr2",
        "image",
        "DeepseekOcr2ForConditionalGeneration",
        deepseek_ocr2,
        ocr2_image,
        ocr2_collate,
    ),
]
