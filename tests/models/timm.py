"""Families whose vision tower is a model of timm; absent without timm."""

from __future__ import annotations

import transformers as tf

from .common import IMG, LM, VID, Family, Item, pixels

PE = dict(embed_dim=32, img_size=(28, 28), depth=2, num_heads=4, global_pool="", ref_feat_shape=(4, 4))
FASTVIT = dict(inference_mode=True, layers=(1, 1, 1, 1, 1), embed_dims=(8, 8, 16, 32, 32))


def perception_lm():
    tower = dict(patch_size=7, use_post_transformer_norm=False, init_values=0.1)
    vision = tf.TimmWrapperConfig(architecture="vit_pe_core_large_patch14_336", model_args=PE | tower)
    return tf.PerceptionLMConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**LM),
        image_token_id=IMG,
        video_token_id=VID,
        projector_pooling_ratio=2,
    )


def tiled_image(i: int, n: int) -> Item:
    """Thumbnail and two tiles."""
    return Item([IMG] * (3 * 4), dict(pixel_values=pixels(1, 3, 3, 28, 28, seed=i)))


def frames(i: int, n: int) -> Item:
    return Item([VID] * (4 * 4), dict(pixel_values_videos=pixels(1, 4, 3, 28, 28, seed=i)))


def fast_vlm():
    vision = tf.TimmWrapperConfig(
        architecture="fastvit_mci3", do_pooling=True, global_pool="avg", hidden_size=64, model_args=FASTVIT
    )
    return tf.FastVlmConfig(
        vision_config=vision, text_config=tf.Qwen2Config(**LM), image_token_id=IMG, image_token_index=IMG
    )


def fast_image(i: int, n: int) -> Item:
    return Item([IMG] * 16, dict(pixel_values=pixels(1, 3, 256, 256, seed=i)))


FAMILIES = [
    Family(
        "perception_lm",
        "image",
        "PerceptionLMForConditionalGeneration",
        perception_lm,
        tiled_image,
        requires="timm",
    ),
    Family(
        "perception_lm",
        "video",
        "PerceptionLMForConditionalGeneration",
        perception_lm,
        frames,
        requires="timm",
    ),
    Family("fast_vlm", "image", "FastVlmForConditionalGeneration", fast_vlm, fast_image, requires="timm"),
]
