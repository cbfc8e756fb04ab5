"""LLaVA-1.5 and its descendants on a CLIP tower: 4x4 patches and a CLS token per tile."""

from __future__ import annotations

import inspect

import torch
import transformers as tf

from .common import IMG, LM, VID, VIT, Family, Item, pixels

SIZE, PATCH, N = 28, 7, 16
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84]]
# (height, width), tiles with the base tile, tokens: base tile + unpadded grid + one newline per grid row
ANYRES = [((40, 56), 5, 16 + 6 * 8 + 6), ((16, 56), 3, 16 + 2 * 8 + 2), ((61, 33), 5, 16 + 8 * 4 + 8)]
FEATURES = dict(vision_feature_layer=-2, vision_feature_select_strategy="default")


def clip() -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**VIT, image_size=SIZE, patch_size=PATCH, projection_dim=32)


def image(i: int, n: int) -> Item:
    return Item([IMG] * N, dict(pixel_values=pixels(1, 3, SIZE, SIZE, seed=i)))


def video_llava_image(i: int, n: int) -> Item:
    """Some releases call the pixels of images ``pixel_values_images`` here, as there is another tower for
    videos.
    """
    names = inspect.signature(tf.VideoLlavaForConditionalGeneration.forward).parameters
    name = "pixel_values_images" if "pixel_values_images" in names else "pixel_values"
    return Item([IMG] * N, {name: pixels(1, 3, SIZE, SIZE, seed=i)})


def anyres(i: int, n: int) -> Item:
    (height, width), tiles, count = ANYRES[i]
    values = pixels(1, 5, 3, SIZE, SIZE, seed=i)
    values[:, tiles:] = 0  # the processor pads the tiles to the largest image of the batch
    return Item([IMG] * count, dict(pixel_values=values, image_sizes=torch.tensor([[height, width]])))


def video(frames: int, per_frame: int):
    def item(i: int, n: int) -> Item:
        return Item(
            [VID] * (frames * per_frame), dict(pixel_values_videos=pixels(1, frames, 3, SIZE, SIZE, seed=i))
        )

    return item


def llava():
    return tf.LlavaConfig(
        vision_config=clip(), text_config=tf.LlamaConfig(**LM), image_token_id=IMG, **FEATURES
    )


def vipllava():
    return tf.VipLlavaConfig(
        vision_config=clip(),
        text_config=tf.LlamaConfig(**LM),
        image_token_id=IMG,
        vision_feature_layers=[-2, -3],
    )


def llava_next():
    text = tf.MistralConfig(**LM, sliding_window=None)
    return tf.LlavaNextConfig(
        vision_config=clip(), text_config=text, image_token_id=IMG, image_grid_pinpoints=PINPOINTS, **FEATURES
    )


def llava_next_video():
    tokens = dict(image_token_id=IMG, video_token_id=VID, image_grid_pinpoints=PINPOINTS)
    pool = dict(spatial_pool_mode="average", spatial_pool_stride=2)
    return tf.LlavaNextVideoConfig(
        vision_config=clip(), text_config=tf.LlamaConfig(**LM), **tokens, **pool, **FEATURES
    )


def video_llava():
    return tf.VideoLlavaConfig(
        vision_config=clip(),
        text_config=tf.LlamaConfig(**LM),
        image_token_id=IMG,
        video_token_id=VID,
        **FEATURES,
    )


FAMILIES = [
    Family("llava", "image", "LlavaForConditionalGeneration", llava, image),
    Family("vipllava", "image", "VipLlavaForConditionalGeneration", vipllava, image),
    Family("llava_next", "image", "LlavaNextForConditionalGeneration", llava_next, anyres),
    Family("llava_next_video", "image", "LlavaNextVideoForConditionalGeneration", llava_next_video, anyres),
    Family(
        "llava_next_video", "video", "LlavaNextVideoForConditionalGeneration", llava_next_video, video(5, 4)
    ),
    Family("video_llava", "image", "VideoLlavaForConditionalGeneration", video_llava, video_llava_image),
    Family("video_llava", "video", "VideoLlavaForConditionalGeneration", video_llava, video(3, 17)),
]
