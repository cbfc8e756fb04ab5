"""Gemma 3n and Gemma 4: embeddings per LLM layer and token, and layers that read the keys of another layer."""

from __future__ import annotations

from inspect import signature

import torch
import transformers as tf

from .common import END, IMG, LM, ROW, START, VID, VIT, VOCAB, Family, Item, pixels
from .qwen import token_types

KINDS = ["sliding_attention", "full_attention"] * 2
AUDIO = ROW + 4
PER_LAYER = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=2)


def gemma3n():
    lm = dict(LM, **PER_LAYER, layer_types=KINDS, head_dim=8, sliding_window=4096, laurel_rank=4)
    audio = dict(
        hidden_size=32,
        input_feat_size=32,
        conf_num_hidden_layers=1,
        conf_num_attention_heads=4,
        sscp_conv_channel_size=(8, 4),
        vocab_size=12,
        vocab_offset=108,
    )
    # soft caps are no part of the oracle: one that caps nothing
    return tf.Gemma3nConfig(
        text_config=tf.Gemma3nTextConfig(**lm, altup_num_inputs=2, final_logit_softcapping=1e4),
        vision_config=tf.Gemma3nVisionConfig(
            architecture="test_resnet", hidden_size=96, vocab_size=8, vocab_offset=100
        ),
        audio_config=audio,
        vision_soft_tokens_per_image=16,
        audio_soft_tokens_per_image=4,
        image_token_id=IMG,
        audio_token_id=AUDIO,
    )


def gemma3n_image(i: int, n: int) -> Item:
    return Item([START, *[IMG] * 16, END], dict(pixel_values=pixels(1, 3, 128, 128, seed=i)))


# -- Gemma 4 -------------------------------------------------------------------------------------------------
PATCH, MOST = 7, 36  # pixels of a patch's side, patches of the largest image
IMAGES = [(4, 6), (6, 4), (4, 4)]  # rows and columns of patches; pooled 2 x 2
# transformers 5.17 stacks videos of one length
OLD = (
    not hasattr(tf, "Gemma4Model")
    or "num_frames_per_video" not in signature(tf.Gemma4Model.forward).parameters
)
VIDEOS = [(3, 4, 4), (3, 4, 6), (3, 6, 4)] if OLD else [(3, 4, 4), (2, 4, 6), (3, 6, 4)]
ROTARY = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
}
LAYERS = dict(layer_types=KINDS, head_dim=8, global_head_dim=16, sliding_window=4096, rope_parameters=ROTARY)
# pictures see themselves in layers with a window only
LARGE = dict(PER_LAYER, num_kv_shared_layers=0, use_bidirectional_attention="vision", attention_k_eq_v=True)
LARGE |= dict(num_global_key_value_heads=1)
TOKENS = dict(image_token_id=IMG, video_token_id=VID, audio_token_id=AUDIO, audio_config=None)


def gemma4(cls: str = "Gemma4", **text_extra):
    def config():
        vision = dict(VIT, num_key_value_heads=4, head_dim=8, patch_size=PATCH, pooling_kernel_size=2)
        lm = getattr(tf, cls + "TextConfig")(**LM, **LAYERS, **text_extra)
        if cls == "Gemma4Unified":
            vision = dict(patch_size=PATCH, pooling_kernel_size=2, mm_embed_dim=32, output_proj_dims=32)
        return getattr(tf, cls + "Config")(text_config=lm, vision_config=vision, **TOKENS)

    return config


def coordinates(rows: int, columns: int) -> torch.Tensor:
    """(MOST, 2): x and y of every patch, -1 for padding."""
    y, x = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    return torch.cat([torch.stack([x, y], -1), torch.full((MOST - rows * columns, 2), -1)])


def patches(frames: int, rows: int, columns: int, side: int, seed: int) -> torch.Tensor:
    values = torch.zeros(frames, MOST, 3 * side * side)
    values[:, : rows * columns] = pixels(frames, rows * columns, 3 * side * side, seed=seed)
    return values


def pictures(merged: bool):
    """The items of Gemma 4, or of a model whose patches are the cells."""
    side, cells = (2 * PATCH, 1) if merged else (PATCH, 4)

    def image(i: int, n: int) -> Item:
        rows, columns = IMAGES[i]
        tensors = dict(
            pixel_values=patches(1, rows, columns, side, i),
            image_position_ids=coordinates(rows, columns)[None],
        )
        return Item([START, *[IMG] * (rows * columns // cells), END], tensors)

    def video(i: int, n: int) -> Item:
        frames, rows, columns = VIDEOS[i]
        ids = [t for _ in range(frames) for t in [START, *[VID] * (rows * columns // cells), END, 9]]
        tensors = dict(
            pixel_values_videos=patches(frames, rows, columns, side, i),
            video_position_ids=coordinates(rows, columns).expand(frames, MOST, 2),
            num_frames_per_video=torch.tensor([frames]),
        )
        if OLD:
            del tensors["num_frames_per_video"]
            tensors = {name: x[None] for name, x in tensors.items()}
        return Item(ids, tensors)

    return image, video


FAMILIES = [
    Family(
        "gemma3n",
        "image",
        "Gemma3nForConditionalGeneration",
        gemma3n,
        gemma3n_image,
        inside=False,
        requires="timm",
    )
]
for name, cls, more in (
    ("gemma4", "Gemma4", PER_LAYER),  # as the small ones: keys are shared, images are read in order
    ("gemma4_large", "Gemma4", LARGE),
    ("gemma4_unified", "Gemma4Unified", {}),
):
    image, video = pictures(merged=cls == "Gemma4Unified")
    made = gemma4(cls, **more)
    FAMILIES += [
        Family(
            name,
            kind,
            f"{cls}ForConditionalGeneration",
            made,
            item,
            extra=token_types,
            inside=more != PER_LAYER,
        )
        for kind, item in (("image", image), ("video", video))
    ]
