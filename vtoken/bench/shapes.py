"""Models of published shapes with random weights, and a prompt for each; nothing is downloaded.

Every shape comes in four scales: "full" is the published model, "cpu" one that a CPU reads in about a second,
"quick" one that it reads in a third of that; "tiny" is for tests. All but the last read hundreds of visual
tokens, and reading them takes most of the time, as in the published model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SCALES = ("full", "cpu", "quick", "tiny")
PLACEHOLDER, VOCAB = 5, {"full": 32064, "cpu": 4096, "quick": 4096, "tiny": 128}
# hidden size, MLP size, layers, heads, key-value heads
VICUNA = {
    "full": (4096, 11008, 32, 32, 32),
    "cpu": (768, 2048, 8, 12, 12),
    "quick": (512, 1376, 6, 8, 8),
    "tiny": (32, 64, 8, 2, 2),
}
QWEN = {
    "full": (3584, 18944, 28, 28, 4),
    "cpu": (768, 3072, 8, 12, 2),
    "quick": (512, 2048, 6, 8, 2),
    "tiny": (32, 64, 8, 2, 1),
}
SMALL_VIT = {"cpu": (256, 1024, 6, 4), "quick": (128, 512, 6, 2), "tiny": (16, 32, 4, 2)}
CLIP, SIGLIP = {"full": (1024, 4096, 24, 16), **SMALL_VIT}, {"full": (1152, 4304, 26, 16), **SMALL_VIT}
QWEN_VIT = {
    "full": (1280, 3420, 32, 16),
    "cpu": (256, 684, 8, 4),
    "quick": (128, 342, 8, 2),
    "tiny": (16, 32, 4, 2),
}
QWEN3 = {"full": (4096, 12288, 36, 32, 8), **{k: v for k, v in QWEN.items() if k != "full"}}
QWEN3_VIT = {**QWEN_VIT, "full": (1152, 4304, 27, 16)}
PATCH, PATCH_QWEN3 = 14, 16


@dataclass(frozen=True)
class Workload:
    """A model and one prompt for it.

    Attributes:
        name: its name in reports.
        model: a transformers model in evaluation mode.
        inputs: keyword arguments of its forward.
        about: description of the shape for the report; plain numbers and strings.
        clock: "wall", or "cpu" for the processor time of this process, which other processes disturb less.
    """

    name: str
    model: Any
    inputs: dict[str, Any]
    about: dict[str, Any]
    clock: str = "wall"


Runs = tuple[int, ...]  # visual tokens that stand together, a text token between one run and the next


@dataclass(frozen=True)
class Shape:
    """One model family at all scales; `size` is the picture or video size that `make` takes."""

    make: Callable[[Shape, str], tuple[str, Any, Runs, dict[str, Any]]]
    llm: Mapping[str, tuple[int, ...]]
    tower: Mapping[str, tuple[int, ...]]
    size: Mapping[str, tuple[int, ...]]

    def build(self, name: str, scale: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Workload:
        """The model on `device`, in bfloat16 on a GPU and float32 elsewhere if `dtype` is None.

        Raises ValueError for an unknown scale.
        """
        import transformers

        if scale not in SCALES:
            raise ValueError(f"Unknown scale {scale!r}: choose one of {', '.join(SCALES)}.")
        dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
        architecture, config, runs, vision = self.make(self, scale)
        torch.manual_seed(0)
        with torch.device(device):
            model = getattr(transformers, architecture)._from_config(config, dtype=dtype).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        text, tokens, place = 12 if scale == "tiny" else 48, sum(runs), 4
        ids = torch.randint(10, VOCAB[scale], (1, text + tokens), generator=torch.Generator().manual_seed(0))
        for run in runs:
            ids[:, place : place + run] = PLACEHOLDER
            place += run + 1
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **vision}
        if architecture.startswith("Qwen"):
            inputs["mm_token_type_ids"] = (ids == PLACEHOLDER).int() * (
                2 if "pixel_values_videos" in vision else 1
            )
        inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        names = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
        about = {
            "scale": scale,
            "dtype": str(dtype).removeprefix("torch."),
            "visual_tokens": tokens,
            "text_tokens": text,
            "llm": dict(zip(names, self.llm[scale])),
            "tower": dict(zip(names, self.tower[scale])),
        }
        return Workload(name, model, inputs, about)


def _llm(shape: Shape, scale: str) -> dict[str, Any]:
    hidden, intermediate, layers, heads, kv_heads = shape.llm[scale]
    return dict(
        vocab_size=VOCAB[scale], hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=32768,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _vit(shape: Shape, scale: str, side: int) -> dict[str, Any]:
    hidden, intermediate, layers, heads = shape.tower[scale]
    return dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, image_size=side * PATCH, patch_size=PATCH,
    )  # fmt: skip


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def llava(shape: Shape, scale: str) -> tuple[str, Any, Runs, dict[str, Any]]:
    """LLaVA-1.5: one picture of side x side patches."""
    import transformers as tf

    (side,) = shape.size[scale]
    vision = tf.CLIPVisionConfig(**_vit(shape, scale, side))
    config = tf.LlavaConfig(
        vision_config=vision, text_config=tf.LlamaConfig(**_llm(shape, scale)), image_token_id=PLACEHOLDER
    )
    return (
        "LlavaForConditionalGeneration",
        config,
        (side**2,),
        {"pixel_values": _pixels(1, 3, side * PATCH, side * PATCH)},
    )


def llava_next(shape: Shape, scale: str) -> tuple[str, Any, Runs, dict[str, Any]]:
    """LLaVA-NeXT: the picture whole and in 2 x 2 tiles; one newline token per row of the tiles."""
    import transformers as tf

    (side,) = shape.size[scale]
    pixels = side * PATCH
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_vit(shape, scale, side)),
        text_config=tf.LlamaConfig(**_llm(shape, scale)),
        image_token_id=PLACEHOLDER,
        image_grid_pinpoints=[[2 * pixels, 2 * pixels]],
    )
    vision = {
        "pixel_values": _pixels(1, 5, 3, pixels, pixels),
        "image_sizes": torch.tensor([[2 * pixels] * 2]),
    }
    return "LlavaNextForConditionalGeneration", config, (5 * side**2 + 2 * side,), vision


def qwen2_5_vl(shape: Shape, scale: str) -> tuple[str, Any, Runs, dict[str, Any]]:
    """Qwen2.5-VL: (frame pairs, height, width) in patches, merged 2 x 2; one frame pair is an image."""
    import transformers as tf

    t, h, w = shape.size[scale]
    hidden, intermediate, depth, heads = shape.tower[scale]
    text = _llm(shape, scale)
    tower = dict(
        depth=depth, hidden_size=hidden, intermediate_size=intermediate, num_heads=heads,
        out_hidden_size=text["hidden_size"], patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2,
        window_size=8 * PATCH, fullatt_block_indexes=list(range(depth // 4 - 1, depth, depth // 4)),
    )  # fmt: skip
    # ids that no prompt holds, but for the one that is used
    tokens = {"image_token_id": 6, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    kind = "image" if t == 1 else "video"
    tokens[f"{kind}_token_id"] = PLACEHOLDER
    config = tf.Qwen2_5_VLConfig(text_config=text | _mrope(text), vision_config=tower, **tokens)
    pixels = _pixels(t * h * w, 3 * 2 * PATCH**2)
    vision = {
        "pixel_values" if t == 1 else "pixel_values_videos": pixels,
        f"{kind}_grid_thw": torch.tensor([[t, h, w]]),
    }
    if t > 1:
        vision["second_per_grid_ts"] = torch.tensor([1.0])
    return "Qwen2_5_VLForConditionalGeneration", config, (t * h * w // 4,), vision


def _mrope(text: dict[str, Any]) -> dict[str, Any]:
    eighth = text["hidden_size"] // text["num_attention_heads"] // 16
    sections = [2 * eighth, 3 * eighth, 3 * eighth]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}}


def qwen3_vl(shape: Shape, scale: str) -> tuple[str, Any, Runs, dict[str, Any]]:
    """Qwen3-VL: (frame pairs, height, width) in patches, merged 2 x 2, a text token between pairs."""
    import transformers as tf

    t, h, w = shape.size[scale]
    hidden, intermediate, depth, heads = shape.tower[scale]
    text, third = _llm(shape, scale), max(depth // 3, 1)
    text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    tower = dict(
        depth=depth, hidden_size=hidden, intermediate_size=intermediate, num_heads=heads,
        out_hidden_size=text["hidden_size"], patch_size=PATCH_QWEN3, spatial_merge_size=2,
        temporal_patch_size=2, num_position_embeddings=48**2,
        deepstack_visual_indexes=list(range(third - 1, depth, third))[:3],
    )  # fmt: skip
    tokens = {"image_token_id": 6, "video_token_id": PLACEHOLDER}
    tokens |= {"vision_start_token_id": 7, "vision_end_token_id": 8}
    config = tf.Qwen3VLConfig(text_config=text | _mrope(text), vision_config=tower, **tokens)
    pixels = _pixels(t * h * w, 3 * 2 * PATCH_QWEN3**2)
    vision = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[t, h, w]])}
    return "Qwen3VLForConditionalGeneration", config, (h * w // 4,) * t, vision


def llava_onevision(shape: Shape, scale: str) -> tuple[str, Any, Runs, dict[str, Any]]:
    """LLaVA-OneVision: frames of side x side patches, pooled to half the side, and one newline token."""
    import transformers as tf

    frames, side = shape.size[scale]
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**_vit(shape, scale, side), vision_use_head=False),
        text_config=tf.Qwen2Config(**_llm(shape, scale)),
        image_token_id=6,
        video_token_id=PLACEHOLDER,
    )
    vision = {"pixel_values_videos": _pixels(1, frames, 3, side * PATCH, side * PATCH)}
    return "LlavaOnevisionForConditionalGeneration", config, (frames * (-(-side // 2)) ** 2 + 1,), vision


SHAPES = {
    "llava-1.5-7b": Shape(llava, VICUNA, CLIP, {"full": (24,), "cpu": (24,), "quick": (24,), "tiny": (6,)}),
    "llava-next-7b": Shape(
        llava_next, VICUNA, CLIP, {"full": (24,), "cpu": (12,), "quick": (12,), "tiny": (4,)}
    ),
    "qwen2.5-vl-7b-image": Shape(
        qwen2_5_vl,
        QWEN,
        QWEN_VIT,
        {"full": (1, 72, 72), "cpu": (1, 44, 44), "quick": (1, 44, 44), "tiny": (1, 12, 12)},
    ),
    "qwen2.5-vl-7b-video": Shape(
        qwen2_5_vl,
        QWEN,
        QWEN_VIT,
        {"full": (16, 28, 28), "cpu": (4, 22, 22), "quick": (4, 22, 22), "tiny": (3, 8, 8)},
    ),
    "qwen3-vl-8b-video": Shape(
        qwen3_vl,
        QWEN3,
        QWEN3_VIT,
        {"full": (16, 24, 24), "cpu": (4, 20, 20), "quick": (4, 20, 20), "tiny": (3, 8, 8)},
    ),
    "llava-onevision-7b-video": Shape(
        llava_onevision, QWEN, SIGLIP, {"full": (32, 27), "cpu": (8, 16), "quick": (8, 16), "tiny": (3, 8)}
    ),
}


def build(name: str, scale: str, device: str = "cpu") -> Workload:
    """One of `SHAPES`. Raises ValueError for an unknown name or scale."""
    if name not in SHAPES:
        raise ValueError(f"Unknown shape {name!r}: choose one of {', '.join(SHAPES)}.")
    return SHAPES[name].build(name, scale, device)


def in_words(work: Workload) -> str:
    """Description of a workload: size of model and prompt, and of the published model if scaled down."""
    about = work.about
    if "llm" not in about:
        return (
            f"{work.name}: {parameters(work) / 1e6:.1f} M parameters, a prompt of {about['prompt_tokens']}"
            " tokens"
        )
    size = f"{about['llm']['layers']} LLM layers of width {about['llm']['hidden_size']}"
    width, _, layers, *_ = SHAPES[work.name].llm["full"]
    size += "" if about["scale"] == "full" else f" in place of {layers} of width {width}"
    tokens = f"{about['visual_tokens']} visual and {about['text_tokens']} text tokens"
    return f"{work.name}, {about['scale']} scale: {size}, random weights, {tokens}"


def parameters(work: Workload) -> int:
    return sum(p.numel() for p in work.model.parameters())


def shipped(model_id: str | None) -> Workload:
    """A model from the Hub or a folder, or a tiny one by name (None: llava), with a picture and a question.

    Raises ValueError if it cannot be loaded.
    """
    from ..asking import TINY_QUESTION, load, prepare
    from ..tiny import names
    from ..tiny.scenes import make_scene

    model, processor = load(model_id)
    inputs = dict(prepare(model, processor, make_scene(0, "test").image, TINY_QUESTION))
    length = inputs["input_ids"].shape[1]
    about = {"scale": "as loaded", "dtype": str(model.dtype).removeprefix("torch."), "prompt_tokens": length}
    tiny = model_id is None or model_id in names()
    return Workload(f"tiny-{model_id or 'llava'}" if tiny else str(model_id), model, inputs, about)
