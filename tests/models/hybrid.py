"""Families whose LLM has layers without a KV cache of one slot per token, or with chunks and windows."""

from __future__ import annotations

from dataclasses import replace

import torch
import transformers as tf

from .common import BREAK, END, IMG, LM, ROW, START, VID, VIT, Family, Item, pixels, text
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
MOST, TAG = 24, ROW + 9


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


# -- Nemotron ------------------------------------------------------------------------------------------------
def nemotron_h_omni():
    vision = tf.RadioConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=1.5,
        patch_size=7,
        max_img_size=112,
        video_temporal_patch_size=2,
        torch_dtype="float32",
    )
    mamba = dict(
        mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, conv_kernel=3, chunk_size=16
    )
    size = {k: v for k, v in LM.items() if k != "num_hidden_layers"}
    kinds = ["linear_attention", "mlp", "full_attention", "linear_attention"]
    lm = tf.NemotronHConfig(**size, **mamba, head_dim=8, layers_block_type=kinds, use_mamba_kernels=False)
    return tf.NemotronH_Omni_Reasoning_V3_Config(
        vision_config=vision,
        text_config=lm,
        vision_hidden_size=32,
        projector_hidden_size=48,
        image_token_id=IMG,
        video_token_id=VID,
    )


def nemotron_image(i: int, n: int) -> Item:
    h, w = SHAPES[i]
    tensors = dict(pixel_values=pixels(h * w, 3 * 7 * 7, seed=i), image_grid_hw=torch.tensor([[h, w]]))
    return Item([START, *[IMG] * (h * w // 4), END], tensors)


def nemotron_video(i: int, n: int) -> Item:
    """Three tubelets of two frames each."""
    ids = [token for f in range(3) for token in [*text(2, 60 + f), START, *[IMG] * 6, END]]
    return Item(ids, dict(pixel_values_videos=pixels(1, 3, 6, 28, 42, seed=i)))


# -- Llama 4 -------------------------------------------------------------------------------------------------
def llama4():
    vision = tf.Llama4VisionConfig(
        **(VIT | dict(intermediate_size=128)),
        image_size=56,
        patch_size=7,
        vision_output_dim=32,
        projector_input_dim=32,
        projector_output_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    experts = dict(num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48)
    lm = tf.Llama4TextConfig(**LM, **experts, head_dim=8, attention_chunk_size=12)
    return tf.Llama4Config(vision_config=vision, text_config=lm, image_token_index=IMG)


LLAMA4_TILES = [(1, 1), (2, 1), (1, 3)]  # rows, columns


def llama4_image(i: int, n: int) -> Item:
    """Tiles row by row with separators, then a tag and the whole image, as the processor writes them."""
    rows, columns = LLAMA4_TILES[i]
    patches, ids = [IMG] * 16, [START]
    for _ in range(rows if rows * columns > 1 else 0):
        ids += [token for c in range(columns) for token in [*patches, BREAK]][:-1] + [ROW]
    tiles = 1 if rows * columns == 1 else rows * columns + 1
    return Item([*ids, TAG, *patches, END], dict(pixel_values=pixels(tiles, 3, 56, 56, seed=i)))


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
    _hybrid("nemotron_h_omni", "image", "NemotronH_Omni_Reasoning_V3", nemotron_h_omni, nemotron_image),
    # 5.23 reads the frames of one video only
    replace(
        _hybrid("nemotron_h_omni", "video", "NemotronH_Omni_Reasoning_V3", nemotron_h_omni, nemotron_video),
        broken=("5.23",),
    ),
    # 5.24.0: its forward reads image_outputs of an output that has none
    replace(
        _hybrid("llama4", "image", "Llama4ForConditionalGeneration", llama4, llama4_image), broken=("5.24",)
    ),
]
