"""Models by name: the trained tiny ones, and small random ones of families that none of them belongs to."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from vtoken import tiny

HIDDEN = 128
SPREAD = 0.2  # of weights, so wide that answers depend on the picture and the question
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
LM = {
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,  # of 32, the smallest that vLLM serves on a CPU
    "head_dim": 32,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": SPREAD,
}
PATCHES = {
    "num_heads": 4,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}


def path(name: str) -> Path:
    """Folder of a model, for any `from_pretrained`; a random one is written once."""
    return tiny.path(name) if name in tiny.names() else _written(name)


def load(name: str) -> tuple[Any, Any]:
    """The model in eval mode, float32, and its processor, as `tiny.load`."""
    folder = path(name)
    model = tf.AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    return model, tf.AutoProcessor.from_pretrained(folder)


@functools.cache
def _written(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return save(name, folder)


@torch.no_grad()
def save(name: str, folder: Path) -> Path:
    """Write a small random model of a family, a name of FAMILIES, and its processor; returns the folder."""
    config, processor = FAMILIES[name]()
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    tokenizer = processor.tokenizer
    model.lm_head.weight[tokenizer.all_special_ids] = 0  # answers are words
    model.generation_config.update(do_sample=False, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _qwen(vision: dict[str, Any], prefix: str, rope: dict[str, Any]) -> tuple[Any, Any]:
    """Configuration and processor of a Qwen model whose classes begin with `prefix`."""
    parts = tf.AutoProcessor.from_pretrained(tiny.path("qwen2_5_vl"))
    text, ids = parts.tokenizer, parts.tokenizer.convert_tokens_to_ids
    named = {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }
    lm = LM | {"vocab_size": len(text), "rope_parameters": rope}
    config = getattr(tf, f"{prefix}Config")(
        text_config=lm, vision_config=PATCHES | vision, tie_word_embeddings=False, **named
    )
    films = parts.video_processor
    if prefix == "Qwen3VL":
        size = dict.fromkeys(("shortest_edge", "longest_edge"), 8 * 9216)
        films = tf.Qwen3VLVideoProcessor(**films.to_dict() | {"size": size, "video_processor_type": None})
    processor = getattr(tf, f"{prefix}Processor")(
        image_processor=parts.image_processor,
        tokenizer=text,
        video_processor=films,
        chat_template=parts.chat_template,
    )
    return config, processor


def qwen2_vl() -> tuple[Any, Any]:
    vision = {"depth": 4, "embed_dim": 96, "hidden_size": HIDDEN, "mlp_ratio": 2, "initializer_range": SPREAD}
    return _qwen(vision, "Qwen2VL", ROPE)


def qwen3_vl() -> tuple[Any, Any]:
    vision = {"depth": 4, "hidden_size": 96, "intermediate_size": 192, "out_hidden_size": HIDDEN}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2], "initializer_range": SPREAD}
    return _qwen(vision, "Qwen3VL", ROPE | {"mrope_interleaved": True})


def internvl() -> tuple[Any, Any]:
    """Tiles of 16 tokens; up to four and the whole image."""
    parts = tf.AutoProcessor.from_pretrained(tiny.path("qwen2_5_vl"))
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    text = tf.AutoTokenizer.from_pretrained(
        tiny.path("qwen2_5_vl"), extra_special_tokens=named | {"video_token": "<video>"}
    )
    template = parts.chat_template
    for kind, token in (("image", text.context_image_token), ("video", text.video_token)):
        template = template.replace(f"<|vision_start|><|{kind}_pad|><|vision_end|>", token)
    size = {"height": 48, "width": 48}
    processor = tf.InternVLProcessor(
        image_processor=tf.GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=text,
        video_processor=tf.InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=template,
    )
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision |= {"image_size": [48, 48], "patch_size": [6, 6], "initializer_range": SPREAD}
    lm = tf.Qwen2Config(**LM | {"vocab_size": len(text), "tie_word_embeddings": False})
    config = tf.InternVLConfig(
        text_config=lm,
        vision_config=vision,
        image_token_id=text.context_image_token_id,
        image_seq_length=16,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return config, processor


FAMILIES = {"internvl": internvl, "qwen2_vl": qwen2_vl, "qwen3_vl": qwen3_vl}
