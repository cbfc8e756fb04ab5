"""DeepSeek-VL, its hybrid with a SAM tower, and Janus."""

from __future__ import annotations

import transformers as tf

from .common import IMG, LM, VIT, Family, Item, pixels
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


def janus():
    size = {k: v for k, v in VIT.items() if k != "intermediate_size"}
    vision = tf.JanusVisionConfig(
        **size, mlp_ratio=1.5, image_size=28, patch_size=7, projection_dim=32, num_image_tokens=16
    )
    vq = dict(embed_dim=8, num_embeddings=16, latent_channels=8, base_channels=32, num_res_blocks=1)
    vq |= dict(channel_multiplier=[1, 1], projection_dim=32, image_token_embed_dim=32)
    return tf.JanusConfig(
        vision_config=vision,
        vq_config=tf.JanusVQVAEConfig(**vq),
        text_config=tf.LlamaConfig(**LM),
        image_token_id=IMG,
    )


HYBRID = "DeepseekVLHybridForConditionalGeneration"
FAMILIES = [
    Family("deepseek_vl", "image", "DeepseekVLForConditionalGeneration", deepseek_vl, image),
    Family("deepseek_vl_hybrid", "image", HYBRID, hybrid, hybrid_image),
    Family("janus", "image", "JanusForConditionalGeneration", janus, image),
]
