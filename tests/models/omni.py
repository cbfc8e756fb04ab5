"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: Qwen-VL's pictures and videos, and audio."""

from __future__ import annotations

import torch
import transformers as tf

from .common import BREAK, LM, ROW, Family, Item
from .qwen import PATCHES, ROPE, TOKENS, image, video

AUDIO, AUDIO_START, AUDIO_END = BREAK, ROW, ROW + 1
MARKS = dict(audio_token_id=AUDIO, audio_start_token_id=AUDIO_START, audio_end_token_id=AUDIO_END)
SOUND = dict(num_mel_bins=8, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48, d_model=32)


def qwen2_5_omni():
    vision = dict(**PATCHES, hidden_size=32, intermediate_size=48, out_hidden_size=32)
    windows = dict(window_size=28, fullatt_block_indexes=[1, 3])
    return tf.Qwen2_5OmniThinkerConfig(
        text_config=dict(**LM, rope_parameters=dict(ROPE)),
        vision_config=vision | windows,
        audio_config=dict(**SOUND, output_dim=32, n_window=4),
        position_id_per_seconds=2,
        seconds_per_chunk=1,
        **MARKS,
        **TOKENS,
    )


def qwen3_omni():
    vision = dict(**PATCHES, hidden_size=32, intermediate_size=48, out_hidden_size=32)
    deepstack = dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 2])
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    rope = dict(ROPE, mrope_interleaved=True)
    return tf.Qwen3OmniMoeThinkerConfig(
        text_config=dict(**LM, head_dim=8, rope_parameters=rope, **experts),
        vision_config=vision | deepstack,
        audio_config=dict(**SOUND, output_dim=32, n_window=50, n_window_infer=100, downsample_hidden_size=8),
        position_id_per_seconds=2,
        **MARKS,
        **TOKENS,
    )


def timed_video(i: int, n: int) -> Item:
    item = video(i, n)
    return Item(item.ids, item.tensors | dict(video_second_per_grid=torch.tensor([1.0 + i])))


FAMILIES = [
    Family(name, modality, cls, config, image if modality == "image" else timed_video, needs_mask=True)
    for name, cls, config in (
        ("qwen2_5_omni", "Qwen2_5OmniThinkerForConditionalGeneration", qwen2_5_omni),
        ("qwen3_omni", "Qwen3OmniMoeThinkerForConditionalGeneration", qwen3_omni),
    )
    for modality in ("image", "video")
]
