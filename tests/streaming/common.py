"""Tiny random models with processors of their real classes, and synthetic frames."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import transformers as tf

from tests.models import FAMILIES, SPECIAL
from tests.models.clip import PINPOINTS, SIZE
from tests.models.common import END, IMG, START, VID, VOCAB

HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
SQUARE = {"height": SIZE, "width": SIZE}
SHORT = {"shortest_edge": SIZE}
WORDS = [
    *"0123456789.<>:,?",
    "seconds",
    "Frame1",
    "Frame2",
    "Frame3",
    "Frame4",
    "user",
    "assistant",
    "what",
    "is",
    "here",
]


def tokenizer(qwen: bool, internvl: bool = False) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    image, video = ("<|image_pad|>", "<|video_pad|>") if qwen else ("<image>", "<video>")
    start, end = ("<|vision_start|>", "<|vision_end|>") if qwen else ("<img>", "</img>")
    names = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    names += [f"w{i}" for i in range(len(names), VOCAB)]
    for i, name in ((IMG, image), (VID, video), (START, start), (END, end)):
        names[i] = name
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=False),
        ]
    )
    tokens = dict(image_token=image, video_token=video)
    if internvl:
        tokens = dict(
            start_image_token=start,
            end_image_token=end,
            context_image_token=image,
            video_token=video,
            image_token=image,
        )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=tokens | dict(vision_start_token=start, vision_end_token=end),
        padding_side="left",
    )


def template(video: bool, wrap: str) -> str:
    kind, placeholder = ("video", "<video>") if video else ("image", "<image>")
    return (
        "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
        f"{{% if c['type'] == '{kind}' %}}{wrap.format(placeholder)}{{% else %}} {{{{ c['text'] }}}}{{% endif %}}"
        "{% endfor %}{% endfor %} assistant :"
    )


def clip_like(name: str) -> Any:
    text = tokenizer(False)
    image = tf.CLIPImageProcessor(size=SHORT, crop_size=SQUARE, **HALF)
    common = dict(
        tokenizer=text, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    if name == "llava":
        return tf.LlavaProcessor(image, chat_template=template(False, "{}"), **common)
    if name == "llava_next":
        pixels = tf.LlavaNextImageProcessor(
            size=SHORT, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **HALF
        )
        return tf.LlavaNextProcessor(pixels, chat_template=template(False, "{}"), **common)
    if name == "llava_next_video":
        frames = tf.LlavaNextVideoVideoProcessor(size=SHORT, crop_size=SQUARE, **HALF)
        pixels = tf.LlavaNextImageProcessor(
            size=SHORT, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **HALF
        )
        return tf.LlavaNextVideoProcessor(
            video_processor=frames, image_processor=pixels, chat_template=template(True, "{}"), **common
        )
    if name == "video_llava":
        frames = tf.VideoLlavaVideoProcessor(size=SHORT, crop_size=SQUARE, **HALF)
        return tf.VideoLlavaProcessor(
            image_processor=tf.VideoLlavaImageProcessor(size=SHORT, crop_size=SQUARE, **HALF),
            video_processor=frames,
            chat_template=template(True, "{}"),
            **common,
        )
    return tf.LlavaOnevisionProcessor(
        image_processor=tf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS, **HALF),
        video_processor=tf.LlavaOnevisionVideoProcessor(size=SQUARE, **HALF),
        tokenizer=text,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template(True, "{}"),
    )


def qwen(name: str) -> Any:
    options = dict(patch_size=7, temporal_patch_size=2, merge_size=2, **HALF)
    size = dict(size={"shortest_edge": 28 * 28, "longest_edge": 10**6})
    kind = "Qwen3VL" if name == "qwen3_vl" else "Qwen2VL"
    processor = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[name]
    wrap = "{}" if name == "qwen3_vl" else "<|vision_start|>{}<|vision_end|>"
    return getattr(tf, processor + "Processor")(
        image_processor=tf.Qwen2VLImageProcessor(**options, **size),
        video_processor=getattr(tf, kind + "VideoProcessor")(**options, **size),
        tokenizer=tokenizer(True),
        chat_template=template(True, wrap).replace("<video>", "<|video_pad|>"),
    )


def internvl() -> Any:
    size = dict(size={"height": 56, "width": 56}, **HALF)
    return tf.InternVLProcessor(
        image_processor=tf.GotOcr2ImageProcessor(**size),
        video_processor=tf.InternVLVideoProcessor(**size),
        tokenizer=tokenizer(False, internvl=True),
        image_seq_length=16,
        chat_template=template(True, "{}"),
    )


VIDEO = [
    "llava_onevision",
    "llava_next_video",
    "video_llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
]
IMAGE = ["llava", "llava_next"]


@functools.cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model that is left as it was found."""
    key = name if name in FAMILIES and name in (*IMAGE, "internvl") else f"{name}/video"
    model = FAMILIES[key].build(dtype=dtype)
    model.generation_config.suppress_tokens = SPECIAL
    model.generation_config.max_new_tokens = model.generation_config.min_new_tokens = 6
    model.generation_config.do_sample = False
    return model


@functools.cache
def processor_of(name: str) -> Any:
    return internvl() if name == "internvl" else qwen(name) if name.startswith("qwen") else clip_like(name)


def frames_of(count: int, size: tuple[int, int] = (28, 42), seed: int = 0) -> np.ndarray:
    """(count, h, w, 3) uint8, every frame unlike the others."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def plain_inputs(name: str, frames: np.ndarray, question: str, fps: float = 2.0) -> Any:
    """The inputs of the model's own processor for all frames at once, as a user would make them."""
    processor = processor_of(name)
    if name in IMAGE:
        media: dict[str, Any] = {"images": list(frames)}
        content = [{"type": "image"}] * len(frames)
    else:
        facts = {"total_num_frames": len(frames), "fps": fps, "frames_indices": list(range(len(frames)))}
        media = {"videos": [frames], "video_metadata": [facts], "do_sample_frames": False}
        content = [{"type": "video"}]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], return_tensors="pt", **media)
