"""The Qwen-VL families: grids of any shape, 2x2 patch merging, M-RoPE; deepstack in Qwen3-VL."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

from .common import END, IMG, LM, START, VID, Family, Item, pixels, text

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TOKENS = dict(image_token_id=IMG, video_token_id=VID, vision_start_token_id=START, vision_end_token_id=END)
PATCHES = dict(depth=4, num_heads=4, patch_size=7, in_channels=3, spatial_merge_size=2, temporal_patch_size=2)
IMAGES = [(1, 6, 12), (1, 8, 10), (1, 10, 8)]  # patches (t, h, w); merged 2x2
VIDEOS = [(3, 4, 6), (2, 6, 8), (4, 4, 4)]
VIDEO_FIELDS = ("pixel_values_videos", "video_grid_thw")


def image(i: int, n: int) -> Item:
    t, h, w = IMAGES[i]
    tensors = dict(
        pixel_values=pixels(t * h * w, 3 * 2 * 7 * 7, seed=i), image_grid_thw=torch.tensor([[t, h, w]])
    )
    return Item([START, *[IMG] * (t * h * w // 4), END], tensors)


def video(i: int, n: int) -> Item:
    t, h, w = VIDEOS[i]
    tensors = dict(zip(VIDEO_FIELDS, (pixels(t * h * w, 3 * 2 * 7 * 7, seed=i), torch.tensor([[t, h, w]]))))
    return Item([START, *[VID] * (t * h * w // 4), END], tensors)


def timed_video(i: int, n: int) -> Item:
    item = video(i, n)
    return Item(item.ids, item.tensors | dict(second_per_grid_ts=torch.tensor([1.0 + i])))


def stamped_video(i: int, n: int) -> Item:
    """Qwen3-VL writes each frame's time as text and wraps every frame on its own."""
    t, h, w = VIDEOS[i]
    ids = [token for f in range(t) for token in [*text(2, 60 + f), START, *[VID] * (h * w // 4), END]]
    return Item(ids, video(i, n).tensors)


def token_types(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return dict(mm_token_type_ids=(ids == IMG).int() + 2 * (ids == VID).int())


def qwen2_vl():
    vision = dict(**PATCHES, embed_dim=32, hidden_size=32, mlp_ratio=2)
    return tf.Qwen2VLConfig(
        text_config=dict(**LM, rope_parameters=dict(ROPE)), vision_config=vision, **TOKENS
    )


def qwen2_5_vl():
    vision = dict(**PATCHES, hidden_size=32, intermediate_size=48, out_hidden_size=32, tokens_per_second=2)
    windows = dict(window_size=28, fullatt_block_indexes=[1, 3])
    return tf.Qwen2_5_VLConfig(
        text_config=dict(**LM, rope_parameters=dict(ROPE)), vision_config=vision | windows, **TOKENS
    )


def qwen3_vl(cls: str, **text_extra):
    def config():
        vision = dict(**PATCHES, hidden_size=32, intermediate_size=48, out_hidden_size=32)
        deepstack = dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 2])
        lm = dict(**LM, head_dim=8, rope_parameters=dict(ROPE, mrope_interleaved=True), **text_extra)
        return getattr(tf, cls)(text_config=lm, vision_config=vision | deepstack, **TOKENS)

    return config


qwen3 = qwen3_vl("Qwen3VLConfig")
qwen3_moe = qwen3_vl("Qwen3VLMoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


def hyperclovax():
    vision = dict(**PATCHES, hidden_size=32, intermediate_size=48, out_hidden_size=32)
    windows = dict(window_size=28, fullatt_block_indexes=[1, 3])
    return tf.HyperCLOVAXVisionV2Config(
        text_config=dict(model_type="hyperclovax", **LM),
        vision_config=dict(model_type="qwen2_5_vl_vision", **vision, **windows),
        image_token_id=IMG,
        video_token_id=VID,
    )


CLOVA = "HyperCLOVAXVisionV2ForConditionalGeneration"


def _family(name: str, modality: str, architecture: str, config, item) -> Family:
    return Family(name, modality, architecture, config, item, extra=token_types)


FAMILIES = [
    _family("qwen2_vl", "image", "Qwen2VLForConditionalGeneration", qwen2_vl, image),
    _family("qwen2_vl", "video", "Qwen2VLForConditionalGeneration", qwen2_vl, video),
    _family("qwen2_5_vl", "image", "Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, image),
    _family("qwen2_5_vl", "video", "Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, timed_video),
    _family("qwen3_vl", "image", "Qwen3VLForConditionalGeneration", qwen3, image),
    _family("qwen3_vl", "video", "Qwen3VLForConditionalGeneration", qwen3, stamped_video),
    _family("qwen3_vl_moe", "image", "Qwen3VLMoeForConditionalGeneration", qwen3_moe, image),
    _family("qwen3_vl_moe", "video", "Qwen3VLMoeForConditionalGeneration", qwen3_moe, stamped_video),
    Family("hyperclovax_vision_v2", "image", CLOVA, hyperclovax, image),
    Family("hyperclovax_vision_v2", "video", CLOVA, hyperclovax, video),
]
