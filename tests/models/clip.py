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


def wide_anyres(i: int, n: int) -> Item:
    """The same numbers of tokens from patches of half the side, four by four of which make two by two cells."""
    item = anyres(i, n)
    values = torch.nn.functional.interpolate(item.tensors["pixel_values"][0], scale_factor=2.0)[None]
    return Item(item.ids, dict(pixel_values=values, image_sizes=2 * item.tensors["image_sizes"]))


def granite4_vision():
    """Two features from layers of the tower and two from one of them, each for a layer of the LLM."""
    vision = tf.CLIPVisionConfig(**(VIT | dict(hidden_size=64)), image_size=2 * SIZE, patch_size=7)
    text = tf.Granite4VisionTextConfig(**LM)
    qformer = dict(num_hidden_layers=1, intermediate_size=48, cross_attention_frequency=1, hidden_size=64)
    qformer |= dict(num_attention_heads=1, encoder_hidden_size=64)
    qformer |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return tf.Granite4VisionConfig(
        vision_config=vision,
        text_config=text,
        qformer_config=dict(**qformer, model_type="blip_2_qformer", use_qformer_text_input=False),
        image_token_index=IMG,
        image_grid_pinpoints=[[2 * h, 2 * w] for h, w in PINPOINTS],
        downsample_rate="2/4",
        deepstack_layer_map=[[-3, 0], [-2, 1]],
        spatial_vision_layer=-2,
        spatial_target_layers=[2, 3],
        projector_dropout=0.0,
    )


FAMILIES = [
    Family("llava", "image", "LlavaForConditionalGeneration", llava, image),
    Family("vipllava", "image", "VipLlavaForConditionalGeneration", vipllava, image),
    Family("llava_next", "image", "LlavaNextForConditionalGeneration", llava_next, anyres),
    Family(
        "granite4_vision",
        "image",
        "Granite4VisionForConditionalGeneration",
        granite4_vision,
        wide_anyres,
        inside=False,
        makes_cache=False,
    ),
    Family("llava_next_video", "image", "LlavaNextVideoForConditionalGeneration", llava_next_video, anyres),
    Family(
        "llava_next_video", "video", "LlavaNextVideoForConditionalGeneration", llava_next_video, video(5, 4)
    ),
    Family("video_llava", "image", "VideoLlavaForConditionalGeneration", video_llava, video_llava_image),
    Family("video_llava", "video", "VideoLlavaForConditionalGeneration", video_llava, video(3, 17)),
]
