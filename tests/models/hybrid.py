"""Families whose LLM has layers without a KV cache of one slot per token, or with chunks and windows."""

from __future__ import annotations

import transformers as tf

from .common import LM, Family
from .qwen import PATCHES, ROPE, TOKENS, image, stamped_video, token_types

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


def _qwen(name: str, modality: str, architecture: str, config, item) -> Family:
    return Family(name, modality, architecture, config, item, extra=token_types, inside=False)


FAMILIES = [
    _qwen("qwen3_5", "image", "Qwen3_5ForConditionalGeneration", dense, image),
    _qwen("qwen3_5", "video", "Qwen3_5ForConditionalGeneration", dense, stamped_video),
    _qwen("qwen3_5_moe", "image", "Qwen3_5MoeForConditionalGeneration", moe, image),
    _qwen("qwen3_5_moe", "video", "Qwen3_5MoeForConditionalGeneration", moe, stamped_video),
]
