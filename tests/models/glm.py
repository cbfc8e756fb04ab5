"""The GLM-V families: Qwen's packed towers, frames of videos between times in text, rope that turns pairs."""

from __future__ import annotations

import transformers as tf
from torch import Tensor

from .common import BREAK, END, IMG, LM, ROW, START, VID, Family, Item, text
from .qwen import VIDEOS, image, token_types, video

TOKENS = dict(image_token_id=IMG, video_token_id=VID, image_start_token_id=START, image_end_token_id=END)
PATCHES = dict(depth=4, num_heads=4, patch_size=7, in_channels=3, spatial_merge_size=2, temporal_patch_size=2)
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
MOE = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1, n_group=1)


def stamped_video(i: int, n: int) -> Item:
    """Every frame has the placeholders of an image, and its time as text after them."""
    t, h, w = VIDEOS[i]
    ids = [token for f in range(t) for token in [START, *[IMG] * (h * w // 4), END, *text(1, 60 + f)]]
    return Item([BREAK, *ids, ROW], video(i, n).tensors)


def video_types(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return dict(mm_token_type_ids=2 * (ids == IMG).int())


def glm(prefix: str, text_config: str, vision_config: str, **text_extra):
    def config():
        vision = getattr(tf, vision_config)(
            **PATCHES, hidden_size=32, intermediate_size=48, out_hidden_size=32, image_size=56
        )
        rope = dict(ROPE, partial_rotary_factor=1.0)
        lm = getattr(tf, text_config)(**LM, rope_parameters=rope, **text_extra)
        tokens = dict(TOKENS, video_start_token_id=BREAK, video_end_token_id=ROW)
        return getattr(tf, f"{prefix}Config")(text_config=lm, vision_config=vision, **tokens)

    return config


def _families(name: str, prefix: str, config) -> list[Family]:
    inside = name == "glm4v_moe"  # the others turn neighbouring channels
    cls = f"{prefix}ForConditionalGeneration"
    return [
        Family(name, "image", cls, config, image, extra=token_types, inside=inside),
        Family(name, "video", cls, config, stamped_video, extra=video_types, inside=inside),
    ]


FAMILIES = [
    *_families("glm4v", "Glm4v", glm("Glm4v", "Glm4vTextConfig", "Glm4vVisionConfig")),
    *_families("glm4v_moe", "Glm4vMoe", glm("Glm4vMoe", "Glm4vMoeTextConfig", "Glm4vMoeVisionConfig", **MOE)),
    *_families("glm46v", "Glm46V", glm("Glm46V", "Glm4vTextConfig", "Glm4vVisionConfig")),
    *_families("glm_ocr", "GlmOcr", glm("GlmOcr", "GlmOcrTextConfig", "GlmOcrVisionConfig")),
]
