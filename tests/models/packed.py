"""SigLIP over packed grids of any shape: Video-LLaMA 3, PaddleOCR-VL, HunYuan-VL; the grids of Qwen's rows."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

from .common import END, IMG, LM, START, VID, VIT, Family, Item, pixels, text
from .qwen import IMAGES, PATCHES, ROPE, TOKENS, VIDEOS, image, token_types, video

AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}


def patches(grid: tuple[int, int, int], seed: int, *shape: int) -> Tensor:
    t, h, w = grid
    return pixels(t * h * w, *shape, seed=seed)


def video_llama_3():
    vision = tf.VideoLlama3VisionConfig(**VIT, patch_size=7)
    return tf.VideoLlama3Config(
        vision_config=vision, text_config=tf.Qwen2Config(**LM), image_token_id=IMG, video_token_id=VID
    )


def llama_image(i: int, n: int) -> Item:
    """A patch is a cell."""
    grid = _, h, w = IMAGES[i]
    tensors = dict(
        pixel_values=patches(grid, i, 3 * 7 * 7),
        image_grid_thw=torch.tensor([grid]),
        image_merge_sizes=torch.tensor([1]),
    )
    return Item([*[IMG] * (h * w)], tensors)


def still_cells(i: int) -> Tensor:
    """(frames, cells) bool: the cells of a video that become tokens; in its first frame all do."""
    t, h, w = VIDEOS[i]
    kept = torch.rand(t, h * w // 4, generator=torch.Generator().manual_seed(i)) < 0.7
    kept[0] = kept[:, 0] = True
    return kept


def llama_video(i: int, n: int) -> Item:
    kept = still_cells(i)
    ids = [token for f, mask in enumerate(kept) for token in [*text(2, 60 + f), *[VID] * int(mask.sum())]]
    tensors = dict(
        pixel_values_videos=patches(VIDEOS[i], i, 3 * 7 * 7),
        video_grid_thw=torch.tensor([VIDEOS[i]]),
        video_merge_sizes=torch.tensor([2]),
        video_compression_mask=kept.flatten(),
    )
    return Item(ids, tensors)


def paddleocr_vl():
    vision = tf.PaddleOCRVLConfig.sub_configs["vision_config"](**VIT, image_size=56, patch_size=7)
    lm = tf.PaddleOCRVLConfig.sub_configs["text_config"](**LM, head_dim=8, rope_parameters=dict(ROPE))
    return tf.PaddleOCRVLConfig(text_config=lm, vision_config=vision, **TOKENS)


def paddle_image(i: int, n: int) -> Item:
    grid = _, h, w = IMAGES[i]
    tensors = dict(pixel_values=patches(grid, i, 3, 7, 7), image_grid_thw=torch.tensor([grid]))
    return Item([START, *[IMG] * (h * w // 4), END], tensors)


def hunyuan_vl():
    vision = tf.HunYuanVLVisionConfig(**VIT, patch_size=7, max_image_size=56, min_image_size=14)
    lm = tf.HunYuanVLTextConfig(**LM, head_dim=8, rope_parameters=dict(AXES))
    return tf.HunYuanVLConfig(
        text_config=lm, vision_config=vision, image_token_id=IMG, im_start_id=START, im_end_id=END
    )


def hunyuan_image(i: int, n: int) -> Item:
    """Every row ends with a newline, the picture begins and ends with a mark."""
    grid = _, h, w = IMAGES[i]
    tensors = dict(pixel_values=patches(grid, i, 3 * 7 * 7), image_grid_thw=torch.tensor([grid]))
    return Item([START, *[IMG] * (h // 2 * (w // 2 + 1) + 2), END], tensors)


def exaone4_5():
    vision = dict(**PATCHES, hidden_size=32, intermediate_size=48, out_hidden_size=32, num_key_value_heads=2)
    windows = dict(window_size=28, fullatt_block_indexes=[1, 3])
    kinds = ["sliding_attention", "full_attention"] * 2
    lm = tf.Exaone4Config(**LM, head_dim=8, sliding_window=4096, layer_types=kinds)
    return tf.Exaone4_5_Config(
        text_config=lm, vision_config=vision | windows, image_token_id=IMG, video_token_id=VID
    )


EXAONE = "Exaone4_5_ForConditionalGeneration"
LLAMA = "VideoLlama3ForConditionalGeneration"
PADDLE = "PaddleOCRVLForConditionalGeneration"
HUNYUAN = "HunYuanVLForConditionalGeneration"
FAMILIES = [
    Family("video_llama_3", "image", LLAMA, video_llama_3, llama_image),
    Family("video_llama_3", "video", LLAMA, video_llama_3, llama_video),
    Family("exaone4_5", "image", EXAONE, exaone4_5, image, inside=False),
    Family("exaone4_5", "video", EXAONE, exaone4_5, video, inside=False),
    Family("paddleocr_vl", "image", PADDLE, paddleocr_vl, paddle_image, extra=token_types),
    Family("hunyuan_vl", "image", HUNYUAN, hunyuan_vl, hunyuan_image, extra=token_types, inside=False),
]
