"""Processors of transformers' own classes for models with random weights; their vocabulary is a few words."""

from __future__ import annotations

from typing import Any

from .shapes import PATCH, PATCH_QWEN3, PLACEHOLDER

QUESTION = "what is here ?"


def _tokenizer(**names: str) -> Any:
    """A word-level tokenizer; the video's placeholder has the id `PLACEHOLDER`, the image's the next one.

    Args:
        names: the special tokens by their names in transformers; `video_token` and `image_token` among them.
    """
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "user", names["video_token"], names["image_token"]]
    words += [name for key, name in names.items() if key not in ("video_token", "image_token")]
    words += [*QUESTION.split(), ":", "assistant"]
    assert words.index(names["video_token"]) == PLACEHOLDER
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=names
    )


def _template(video: str) -> str:
    return f"user : {video} {{{{ messages[-1]['content'][-1]['text'] }}}} assistant :"


def onevision(model: Any) -> Any:
    """The processor of a LLaVA-OneVision."""
    import transformers as tf

    vision = model.config.vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    return tf.LlavaOnevisionProcessor(
        image_processor=tf.LlavaOnevisionImageProcessor(size=size),
        video_processor=tf.LlavaOnevisionVideoProcessor(size=size),
        tokenizer=_tokenizer(image_token="<image>", video_token="<video>"),
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy="full",
        chat_template=_template("<video>"),
    )


def qwen2_5_vl(pixels: int) -> Any:
    """The processor of a Qwen2.5-VL; a frame is resized to at most `pixels`."""
    import transformers as tf

    given = {"size": {"shortest_edge": 4 * PATCH**2, "longest_edge": pixels}, **_patches(PATCH)}
    # the cap of the reference implementation would come on top of `pixels`
    videos = tf.Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **given)
    return tf.Qwen2_5_VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(**given), video_processor=videos, **_qwen()
    )


def qwen3_vl(pixels: int, frames: int) -> Any:
    """The processor of a Qwen3-VL; `frames` frames together are resized to at most `pixels` each."""
    import transformers as tf

    edge = {"shortest_edge": 4 * PATCH_QWEN3**2, "longest_edge": pixels}
    videos = tf.Qwen3VLVideoProcessor(
        size=edge | {"longest_edge": frames * pixels}, cap_pixels_per_frame=False, **_patches(PATCH_QWEN3)
    )
    images = tf.Qwen2VLImageProcessor(size=edge, **_patches(PATCH_QWEN3))
    return tf.Qwen3VLProcessor(image_processor=images, video_processor=videos, **_qwen())


def _patches(side: int) -> dict[str, int]:
    return {"patch_size": side, "temporal_patch_size": 2, "merge_size": 2}


def _qwen() -> dict[str, Any]:
    names = {"video_token": "<|video_pad|>", "image_token": "<|image_pad|>"}
    names |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    template = _template("<|vision_start|> <|video_pad|> <|vision_end|>")
    return {"tokenizer": _tokenizer(**names), "chat_template": template}
