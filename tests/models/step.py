"""Step 3.7: crops row by row with marks around them, then the whole image."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

from .common import END, IMG, LM, ROW, START, VIT, Family, Item, concatenate, pixels

CROPS = [(1, 3), (0, 0), (2, 2)]  # rows and columns


def step3p7():
    vision = dict(VIT, image_size=112, patch_size=7, max_position_embeddings=256)
    experts = dict(n_routed_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    kinds = dict(
        layer_types=["full_attention", "sliding_attention"] * 2, mlp_layer_types=["dense", "sparse"] * 2
    )
    lm = dict(**LM, head_dim=8, sliding_window=4096, share_expert_dim=24, **experts, **kinds)
    return tf.Step3p7Config(vision_config=vision, text_config=lm, image_token_id=IMG)


def image(i: int, n: int) -> Item:
    rows, columns = CROPS[i]
    ids = []
    for r in range(rows):
        ids += [ROW] if r else []
        ids += [token for _ in range(columns) for token in [START, *[IMG] * 4, END]]
    tensors = dict(
        pixel_values=pixels(1, 3, 112, 112, seed=i),
        pixel_values_local=pixels(rows * columns, 3, 56, 56, seed=i + 9),
        num_local_patches=torch.tensor([rows * columns]),
    )
    return Item([*ids, ROW + 1, *[IMG] * 16, ROW + 2], tensors)


def collate(rows: list[list[Item]]) -> dict[str, Tensor]:
    made = concatenate(rows)
    if made and not len(made["pixel_values_local"]):
        del made["pixel_values_local"]
    return made


FAMILIES = [Family("step3p7", "image", "Step3p7ForConditionalGeneration", step3p7, image, collate)]
