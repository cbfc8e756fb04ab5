"""ERNIE 4.5 VL: experts of their own for visual tokens and the marks around them, pairs of frames."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

from .common import END, IMG, LM, START, VID, Family, Item, pixels
from .qwen import IMAGES, token_types

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
EXPERTS = dict(moe_k=2, moe_num_experts=4, moe_num_shared_experts=1, moe_intermediate_size=[24, 24])
VIDEOS = [(4, 4, 6), (2, 6, 8), (6, 4, 4)]


def ernie():
    sub = tf.Ernie4_5_VLMoeConfig.sub_configs
    vision = sub["vision_config"](
        depth=4, hidden_size=32, num_heads=4, patch_size=7, intermediate_size=48, spatial_merge_size=2
    )
    lm = sub["text_config"](**LM, **EXPERTS, rope_parameters=dict(ROPE))
    marks = dict(image_start_token_id=START, image_end_token_id=END)
    return tf.Ernie4_5_VLMoeConfig(
        text_config=lm, vision_config=vision, image_token_id=IMG, video_token_id=VID, **marks
    )


def image(i: int, n: int) -> Item:
    grid = _, h, w = IMAGES[i]
    tensors = dict(pixel_values=pixels(h * w, 3 * 7 * 7, seed=i), image_grid_thw=torch.tensor([grid]))
    return Item([START, *[IMG] * (h * w // 4), END], tensors)


def video(i: int, n: int) -> Item:
    grid = t, h, w = VIDEOS[i]
    tensors = dict(
        pixel_values_videos=pixels(t * h * w, 3 * 7 * 7, seed=i), video_grid_thw=torch.tensor([grid])
    )
    return Item([START, *[VID] * (t * h * w // 8), END], tensors)


def types(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The experts of visual tokens serve the marks around them too."""
    visual = token_types(ids, mask)["mm_token_type_ids"]
    return dict(
        mm_token_type_ids=visual, moe_mm_token_type_ids=visual + ((ids == START) | (ids == END)).int()
    )


CLS = "Ernie4_5_VLMoeForConditionalGeneration"
FAMILIES = [
    Family("ernie4_5_vl_moe", "image", CLS, ernie, image, extra=types, inside=False),
    Family("ernie4_5_vl_moe", "video", CLS, ernie, video, extra=types, inside=False),
]
