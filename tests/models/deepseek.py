"""DeepSeek-VL and its hybrid with a SAM tower."""

from __future__ import annotations

import transformers as tf

from .common import IMG, LM, Family, Item, pixels
from .ocr import SAM
from .siglip import siglip


def deepseek_vl():
    return tf.DeepseekVLConfig(vision_config=siglip(), text_config=tf.LlamaConfig(**LM), image_token_id=IMG)


def image(i: int, n: int) -> Item:
    return Item([IMG] * 16, dict(pixel_values=pixels(1, 3, 28, 28, seed=i)))


def hybrid():
    windows = dict(image_size=56, patch_size=7, window_size=4, global_attn_indexes=[1, 3])
    return tf.DeepseekVLHybridConfig(
        vision_config=siglip(),
        high_res_vision_config=tf.SamVisionConfig(**SAM, **windows),
        text_config=tf.LlamaConfig(**LM),
        image_token_id=IMG,
    )


def hybrid_image(i: int, n: int) -> Item:
    item = image(i, n)
    return Item(item.ids, item.tensors | dict(high_res_pixel_values=pixels(1, 3, 56, 56, seed=50 + i)))


HYBRID = "DeepseekVLHybridForConditionalGeneration"
FAMILIES = [
    Family("deepseek_vl", "image", "DeepseekVLForConditionalGeneration", deepseek_vl, image),
    Family("deepseek_vl_hybrid", "image", HYBRID, hybrid, hybrid_image),
]
