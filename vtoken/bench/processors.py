"""Processors of transformers' own classes for models with random weights; their vocabulary is a few words."""

from __future__ import annotations

from typing import Any

from .shapes import PATCH, PLACEHOLDER

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


def qwen2_5_vl(model: Any, pixels: int) -> Any:
    """The processor of a Qwen2.5-VL; a frame is resized to at most `pixels`."""
    import transformers as tf

    size = {"shortest_edge": 4 * PATCH**2, "longest_edge": pixels}
    patches = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    names = {"video_token": "<|video_pad|>", "image_token": "<|image_pad|>"}
    names |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    return tf.Qwen2_5_VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(size=size, **patches),
        video_processor=tf.Qwen2VLVideoProcessor(size=size, **patches),
        tokenizer=_tokenizer(**names),
        chat_template=_template("<|vision_start|> <|video_pad|> <|vision_end|>"),
    )
