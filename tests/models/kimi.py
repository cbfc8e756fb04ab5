"""Kimi K2.5: packed patches, chunks of frames with their times in text, an LLM with compressed keys."""

from __future__ import annotations

import torch
import transformers as tf

from .common import END, IMG, LM, START, VID, VIT, Family, Item, pixels, text
from .qwen import IMAGES

# (frames, patches, patches)
CHUNKS = [[(2, 4, 6), (1, 4, 6)], [(3, 6, 4)], [(4, 4, 4), (4, 4, 4)]]
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
MOE = dict(moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=2)


def kimi_k25():
    vision = dict(**VIT, patch_size=7, pos_emb_height=8, pos_emb_width=8, pos_emb_time=4)
    rope = dict(rope_type="axial", rope_theta=10000.0)
    lm = tf.DeepseekV3Config(
        **(LM | dict(num_key_value_heads=4)), **MLA, **MOE, first_k_dense_replace=1, num_mtp_layers=0
    )
    return tf.Kimi_K25Config(
        vision_config=vision | dict(rope_parameters=rope),
        text_config=lm,
        projection_hidden_size=32,
        image_token_id=IMG,
        video_token_id=VID,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def image(i: int, n: int) -> Item:
    grid = _, h, w = IMAGES[i]
    tensors = dict(pixel_values=pixels(h * w, 3, 7, 7, seed=i), image_grid_thw=torch.tensor([grid]))
    return Item([START, *[IMG] * (h * w // 4), END], tensors)


def video(i: int, n: int) -> Item:
    """The tokens of a chunk are those of one frame."""
    ids = [
        t
        for c, (_, h, w) in enumerate(CHUNKS[i])
        for t in [*text(3, 60 + c), START, *[VID] * (h * w // 4), END]
    ]
    patches = sum(t * h * w for t, h, w in CHUNKS[i])
    tensors = dict(
        pixel_values_videos=pixels(patches, 3, 7, 7, seed=i), video_grid_thw=torch.tensor(CHUNKS[i])
    )
    return Item(ids, tensors)


BEFORE_5_24 = tuple(f"5.{minor}" for minor in range(17, 24))  # one chunk per call only
KIMI = "Kimi_K25ForConditionalGeneration"
FAMILIES = [
    Family("kimi_k25", "image", KIMI, kimi_k25, image, inside=False),
    Family("kimi_k25", "video", KIMI, kimi_k25, video, inside=False, broken=BEFORE_5_24),
]
