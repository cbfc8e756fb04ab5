"""Families on towers without a CLS token in their features: SigLIP, Pixtral, InternViT."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

from .clip import PINPOINTS, SIZE, anyres, image
from .common import BREAK, END, IMG, LM, ROW, START, VID, VIT, Family, Item, concatenate, pixels

TILES = [1, 3, 2]  # tiles per image where the processor splits images
GRIDS = [(4, 6), (5, 4), (4, 4)]  # merged Pixtral patches


def siglip(size: int = SIZE) -> tf.SiglipVisionConfig:
    return tf.SiglipVisionConfig(**VIT, image_size=size, patch_size=7, vision_use_head=False)


def llava_onevision():
    tokens = dict(image_token_id=IMG, video_token_id=VID, image_grid_pinpoints=PINPOINTS)
    features = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")
    return tf.LlavaOnevisionConfig(
        vision_config=siglip(), text_config=tf.Qwen2Config(**LM), **tokens, **features
    )


def onevision_image(i: int, n: int) -> Item:
    """Alone in its prompt an image is split (anyres); beside others it gets its base tile and one newline."""
    item = anyres(i, n)
    ids = item.ids if n == 1 else [IMG] * 17
    return Item(ids, item.tensors)


def onevision_collate(rows: list[list[Item]]) -> dict[str, Tensor]:
    return concatenate(rows) | {"batch_num_images": torch.tensor([len(row) for row in rows if row])}


def onevision_video(i: int, n: int) -> Item:
    return Item([VID] * (5 * 4 + 1), dict(pixel_values_videos=pixels(1, 5, 3, SIZE, SIZE, seed=i)))


def internvl():
    vision = tf.InternVLVisionConfig(**VIT, image_size=[56, 56], patch_size=[7, 7], use_qk_norm=True)
    return tf.InternVLConfig(
        vision_config=vision, text_config=tf.Qwen2Config(**LM), image_token_id=IMG, downsample_ratio=0.5
    )


def internvl_image(i: int, n: int) -> Item:
    return Item(
        [START, *[IMG] * (16 * TILES[i]), END], dict(pixel_values=pixels(TILES[i], 3, 56, 56, seed=i))
    )


def idefics(prefix: str):
    def config():
        cls, vision = getattr(tf, prefix + "Config"), getattr(tf, prefix + "VisionConfig")
        tower = vision(**VIT, image_size=56, patch_size=7)
        return cls(vision_config=tower, text_config=tf.LlamaConfig(**LM), image_token_id=IMG, scale_factor=2)

    return config


def idefics_image(i: int, n: int) -> Item:
    ids = [token for tile in range(TILES[i]) for token in [START, ROW + tile, *[IMG] * 16]]
    return Item([*ids, START], dict(pixel_values=pixels(TILES[i], 3, 56, 56, seed=i)))


def idefics_collate(rows: list[list[Item]]) -> dict[str, Tensor]:
    """(batch, most tiles, 3, H, W); missing tiles are all zero, which is how the model knows them."""
    tiles = [
        torch.cat([item.tensors["pixel_values"] for item in row]) if row else torch.zeros(0, 3, 56, 56)
        for row in rows
    ]
    most = max(len(t) for t in tiles)
    values = torch.stack([torch.cat([t, t.new_zeros(most - len(t), 3, 56, 56)]) for t in tiles])
    real = torch.tensor([[k < len(t) for k in range(most)] for t in tiles])
    return dict(
        pixel_values=values,
        pixel_attention_mask=real[:, :, None, None].expand(-1, -1, 56, 56).long().contiguous(),
    )


def gemma3():
    layers = ["sliding_attention", "full_attention"] * 2
    lm = dict(**LM, head_dim=8, sliding_window=4096, query_pre_attn_scalar=8, layer_types=layers)
    return tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**lm),
        vision_config=siglip(56),
        mm_tokens_per_image=16,
        image_token_id=IMG,
    )


def gemma3_image(i: int, n: int) -> Item:
    return Item([START, *[IMG] * 16, END], dict(pixel_values=pixels(1, 3, 56, 56, seed=i)))


def paligemma():
    lm = tf.GemmaConfig(**LM, head_dim=8)
    return tf.PaliGemmaConfig(vision_config=siglip(), text_config=lm, image_token_id=IMG, projection_dim=32)


def mistral3():
    vision = tf.PixtralVisionConfig(**VIT, image_size=84, patch_size=7, head_dim=8)
    lm = tf.MistralConfig(**LM, sliding_window=None)
    return tf.Mistral3Config(
        vision_config=vision,
        text_config=lm,
        image_token_id=IMG,
        vision_feature_layer=-1,
        spatial_merge_size=2,
    )


def mistral4():
    """Mistral 3's vision side over an LLM with compressed keys and experts."""
    config = mistral3()
    size = {k: v for k, v in LM.items() if k != "num_key_value_heads"}
    ranks = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    experts = dict(
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1
    )
    config.text_config = tf.Mistral4Config(**size, **ranks, **experts)
    return config


def mistral3_image(i: int, n: int) -> Item:
    h, w = GRIDS[i]
    ids = [token for _ in range(h) for token in [*[IMG] * w, BREAK]]
    return Item(
        [*ids[:-1], END],
        dict(pixel_values=pixels(1, 3, 14 * h, 14 * w, seed=i), image_sizes=torch.tensor([[14 * h, 14 * w]])),
    )


def mistral3_collate(rows: list[list[Item]]) -> dict[str, Tensor]:
    items = [item.tensors for row in rows for item in row]
    if not items:
        return {}
    sizes = torch.cat([t["image_sizes"] for t in items])
    high, wide = sizes.max(0).values.tolist()
    values = torch.zeros(len(items), 3, high, wide)
    for k, t in enumerate(items):
        values[k, :, : sizes[k, 0], : sizes[k, 1]] = t["pixel_values"][0]
    return dict(pixel_values=values, image_sizes=sizes)


FAMILIES = [
    Family(
        "llava_onevision",
        "image",
        "LlavaOnevisionForConditionalGeneration",
        llava_onevision,
        onevision_image,
        onevision_collate,
    ),
    Family(
        "llava_onevision", "video", "LlavaOnevisionForConditionalGeneration", llava_onevision, onevision_video
    ),
    Family("internvl", "image", "InternVLForConditionalGeneration", internvl, internvl_image),
    Family(
        "smolvlm",
        "image",
        "SmolVLMForConditionalGeneration",
        idefics("SmolVLM"),
        idefics_image,
        idefics_collate,
    ),
    Family(
        "idefics3",
        "image",
        "Idefics3ForConditionalGeneration",
        idefics("Idefics3"),
        idefics_image,
        idefics_collate,
    ),
    Family(
        "gemma3",
        "image",
        "Gemma3ForConditionalGeneration",
        gemma3,
        gemma3_image,
        extra=lambda ids, mask: dict(token_type_ids=(ids == IMG).long()),
    ),
    Family(
        "mistral3", "image", "Mistral3ForConditionalGeneration", mistral3, mistral3_image, mistral3_collate
    ),
    Family(
        "mistral4",
        "image",
        "Mistral3ForConditionalGeneration",
        mistral4,
        mistral3_image,
        mistral3_collate,
        inside=False,
    ),
    Family(
        "paligemma",
        "image",
        "PaliGemmaForConditionalGeneration",
        paligemma,
        image,
        extra=lambda ids, mask: dict(token_type_ids=torch.zeros_like(ids)),
        images_first=True,
    ),
]
