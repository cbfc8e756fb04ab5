"""Ovis2, GOT-OCR2 and LightOnOCR: tiles of three towers, images of any size."""

from __future__ import annotations

import torch
import transformers as tf

from .common import BREAK, END, IMG, LM, ROW, START, VIT, Family, Item, pixels
from .siglip import GRIDS, TILES, internvl_image, mistral3_collate

GRID, COLUMN = ROW + 1, BREAK  # Ovis2's indicators, with START, ROW and END
SAM = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, output_channels=16, mlp_dim=48)


def ovis2():
    vision = tf.Ovis2VisionConfig(**VIT, image_size=56, patch_size=7, hidden_stride=2, vocab_size=64)
    return tf.Ovis2Config(
        vision_config=vision,
        text_config=tf.Qwen2Config(**LM),
        image_token_id=IMG,
        visual_indicator_token_ids=[START, GRID, COLUMN, ROW, END],
        vocab_size=LM["vocab_size"],
        hidden_size=LM["hidden_size"],
    )


def ovis2_prompt(rows: int, columns: int) -> list[int]:
    ids = [START, *[IMG] * 16, GRID]
    for r in range(rows if rows * columns > 1 else 0):
        for c in range(columns):
            ids += [*[IMG] * 16, *([COLUMN] if c < columns - 1 else [])]
        ids += [ROW] if r < rows - 1 else []
    return [*ids, END]


def ovis2_image(i: int, n: int) -> Item:
    rows, columns = [(1, 1), (2, 1), (1, 3)][i]
    tiles = 1 + rows * columns * (rows * columns > 1)
    return Item(ovis2_prompt(rows, columns), dict(pixel_values=pixels(tiles, 3, 56, 56, seed=i)))


def got_ocr2():
    vision = tf.GotOcr2VisionConfig(
        **SAM, image_size=112, patch_size=7, window_size=4, global_attn_indexes=[1, 3]
    )
    return tf.GotOcr2Config(
        vision_config=vision, text_config=tf.Qwen2Config(**LM), image_token_id=IMG, image_token_index=IMG
    )


def got_image(i: int, n: int) -> Item:
    return Item(
        [START, *[IMG] * (16 * TILES[i]), END], dict(pixel_values=pixels(TILES[i], 3, 112, 112, seed=i))
    )


def lighton_ocr():
    vision = tf.PixtralVisionConfig(**VIT, image_size=84, patch_size=7, head_dim=8)
    lm = tf.Qwen3Config(**LM, head_dim=8)
    return tf.LightOnOcrConfig(vision_config=vision, text_config=lm, image_token_id=IMG, spatial_merge_size=2)


def lighton_image(i: int, n: int) -> Item:
    h, w = GRIDS[i]
    return Item(
        [*[IMG] * (h * w), END],
        dict(pixel_values=pixels(1, 3, 14 * h, 14 * w, seed=i), image_sizes=torch.tensor([[14 * h, 14 * w]])),
    )


def qianfan_ocr():
    vision = dict(**VIT, image_size=[56, 56], patch_size=[7, 7], use_qk_norm=True, drop_path_rate=0.0)
    return tf.QianfanOCRConfig(
        vision_config=vision,
        text_config=tf.Qwen3Config(**LM, head_dim=8),
        image_token_id=IMG,
        downsample_ratio=0.5,
    )


FAMILIES = [
    Family("qianfan_ocr", "image", "QianfanOCRForConditionalGeneration", qianfan_ocr, internvl_image),
    Family("ovis2", "image", "Ovis2ForConditionalGeneration", ovis2, ovis2_image),
    Family("got_ocr2", "image", "GotOcr2ForConditionalGeneration", got_ocr2, got_image),
    Family(
        "lighton_ocr",
        "image",
        "LightOnOcrForConditionalGeneration",
        lighton_ocr,
        lighton_image,
        mistral3_collate,
    ),
]
