"""Families whose LLM has layers without a KV cache of one slot per token, or with chunks and windows."""

from __future__ import annotations

import torch
import transformers as tf

from .common import END, IMG, LM, START, VIT, Family, Item, pixels
from .qwen import PATCHES, ROPE, TOKENS, image, stamped_video, token_types, video

KINDS = ["linear_attention", "full_attention"] * 2
LINEAR = dict(
    linear_conv_kernel_dim=3,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)


def qwen3_5(cls: str, **text_extra):
    def config():
        vision = dict(**PATCHES, hidden_size=32, intermediate_size=48, out_hidden_size=32)
        rope = dict(ROPE, mrope_interleaved=True, partial_rotary_factor=1.0)
        lm = dict(**LM, head_dim=8, rope_parameters=rope, layer_types=KINDS, **LINEAR, **text_extra)
        return getattr(tf, cls)(
            text_config=lm, vision_config=vision | dict(num_position_embeddings=64), **TOKENS
        )

    return config


dense = qwen3_5("Qwen3_5Config")
moe = qwen3_5(
    "Qwen3_5MoeConfig",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
)


# -- LFM -----------------------------------------------------------------------------------------------------
SHAPES = [(4, 6), (6, 4), (4, 4)]  # patches (h, w); merged 2x2
MOST = 24


def lfm2_vl():
    vision = tf.Siglip2VisionConfig(**VIT, num_patches=64, patch_size=7, vision_use_head=False)
    lm = tf.Lfm2Config(**LM, layer_types=["conv", "full_attention"] * 2, conv_L_cache=3)
    return tf.Lfm2VlConfig(
        vision_config=vision,
        text_config=lm,
        image_token_id=IMG,
        projector_hidden_size=48,
        tie_word_embeddings=False,
    )


def lfm2_image(i: int, n: int) -> Item:
    h, w = SHAPES[i]
    values = torch.zeros(1, MOST, 3 * 7 * 7)
    values[:, : h * w] = pixels(1, h * w, 3 * 7 * 7, seed=i)
    tensors = dict(
        pixel_values=values,
        spatial_shapes=torch.tensor([[h, w]]),
        pixel_attention_mask=(torch.arange(MOST) < h * w).long()[None],
    )
    return Item([START, *[IMG] * (h * w // 4), END], tensors)


def lfm3_vl():
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4)
    vision = dict(hidden_size=32, intermediate_size=48, patch_size=7, **heads)
    kinds = ["conv", "full_attention", "conv", "sliding_attention"]
    lm = tf.Lfm3Config(**LM, head_dim=8, layer_types=kinds, conv_L_cache=3, sliding_window=4096)
    return tf.Lfm3VlConfig(
        vision_config=vision, text_config=lm, projector_hidden_size=48, tie_word_embeddings=False, **TOKENS
    )


def _hybrid(name: str, modality: str, architecture: str, config, item) -> Family:
    return Family(name, modality, architecture, config, item, inside=False)


def _qwen(name: str, modality: str, architecture: str, config, item) -> Family:
    return Family(name, modality, architecture, config, item, extra=token_types, inside=False)


FAMILIES = [
    _qwen("qwen3_5", "image", "Qwen3_5ForConditionalGeneration", dense, image),
    _qwen("qwen3_5", "video", "Qwen3_5ForConditionalGeneration", dense, stamped_video),
    _qwen("qwen3_5_moe", "image", "Qwen3_5MoeForConditionalGeneration", moe, image),
    _qwen("qwen3_5_moe", "video", "Qwen3_5MoeForConditionalGeneration", moe, stamped_video),
    _hybrid("lfm2_vl", "image", "Lfm2VlForConditionalGeneration", lfm2_vl, lfm2_image),
    _hybrid("lfm3_vl", "image", "Lfm3VlForConditionalGeneration", lfm3_vl, image),
    _hybrid("lfm3_vl", "video", "Lfm3VlForConditionalGeneration", lfm3_vl, video),
]
