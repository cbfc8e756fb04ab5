"""Molmo2: whole views and overlapping crops as flat patches, with the patches of every token."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

from .common import BREAK, END, IMG, LM, START, VIT, Family, Item, pixels, text

PIXELS, SIDE = 3 * 7 * 7, 6  # of a patch, patches along a crop
GRIDS = [(3, 3, 3, 5), (3, 3, 5, 3), (3, 3, 3, 3)]  # cells of the whole view and of the crops
VIDEOS = [(2, 3, 3), (3, 3, 3), (2, 3, 3)]


def molmo2():
    heads = dict(num_key_value_heads=4, head_dim=8)
    vision = tf.Molmo2VisionConfig(**VIT, **heads, patch_size=7, image_size=[42, 42])
    adapter = dict(hidden_size=32, num_attention_heads=4, text_hidden_size=32, intermediate_size=48)
    size = {k: v for k, v in LM.items() if k not in ("vocab_size", "pad_token_id")}
    lm = tf.Molmo2TextConfig(**size, vocab_size=120, additional_vocab_size=0, head_dim=8, pad_token_id=0)
    return tf.Molmo2Config(
        vision_config=vision,
        text_config=lm,
        adapter_config=tf.Molmo2AdapterConfig(**adapter, **heads, vision_feature_layer=[3, 1]),
        image_start_token_id=START,
        image_end_token_id=END,
        image_patch_id=IMG,
    )


def windows(rows: int, columns: int, first: int) -> Tensor:
    """(cells, 4): the patches of every 2 x 2 window of a grid whose patches are numbered from `first`."""
    index = torch.arange(4 * rows * columns).view(rows, 2, columns, 2)
    return first + index.transpose(1, 2).reshape(-1, 4)


def joined_crops(rows: int, columns: int) -> Tensor:
    """(2 rows, 2 columns): the patches of a grid over two crops of 6 x 6 that overlap by two lines."""
    crops = torch.arange(2 * SIDE * SIDE).view(2, SIDE, SIDE)
    if (rows, columns) == (3, 3):
        return crops[0]
    parts = [crops[0, :, :5], crops[1, :, 1:]] if columns == 5 else [crops[0, :5], crops[1, 1:]]
    return torch.cat(parts, 1 if columns == 5 else 0)


def image(i: int, n: int) -> Item:
    high, wide, rows, columns = GRIDS[i]
    crops = 1 + (1 if (rows, columns) == (3, 3) else 2)
    index = joined_crops(rows, columns).view(rows, 2, columns, 2).transpose(1, 2).reshape(-1, 4)
    pooling = torch.cat([windows(high, wide, 0), SIDE * SIDE + index])
    tensors = dict(
        pixel_values=pixels(crops, SIDE * SIDE, PIXELS, seed=i),
        image_token_pooling=pooling,
        image_grids=torch.tensor([GRIDS[i]]),
        image_num_crops=torch.tensor([crops]),
    )
    whole, cut = [*[IMG] * wide, BREAK] * high, [*[IMG] * columns, BREAK] * rows
    return Item([START, *whole, END, START, *cut, END], tensors)


def video(i: int, n: int) -> Item:
    frames, rows, columns = VIDEOS[i]
    tensors = dict(
        pixel_values_videos=pixels(frames, SIDE * SIDE, PIXELS, seed=i),
        video_token_pooling=torch.cat([windows(rows, columns, f * SIDE * SIDE) for f in range(frames)]),
        video_grids=torch.tensor([VIDEOS[i]]),
    )
    ids = [t for f in range(frames) for t in [*text(2, 60 + f), START, *[IMG] * (rows * columns), END]]
    return Item(ids, tensors)


def collate(rows: list[list[Item]]) -> dict[str, Tensor]:
    """The patches of a token are counted over the whole batch."""
    out: dict[str, list[Tensor]] = {}
    first = 0
    for item in (item for row in rows for item in row):
        for key, value in item.tensors.items():
            out.setdefault(key, []).append(value + first if key.endswith("pooling") else value)
        first += sum(v.shape[0] * v.shape[1] for k, v in item.tensors.items() if k.startswith("pixel"))
    return {key: torch.cat(values) for key, values in out.items()}


def types(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Visual tokens and the marks around them see each other."""
    visual = (ids == IMG) | (ids == START) | (ids == END) | (ids == BREAK)
    return dict(mm_token_type_ids=visual.int())


MOLMO2 = "Molmo2ForConditionalGeneration"
FAMILIES = [
    Family("molmo2", "image", MOLMO2, molmo2, image, collate, extra=types),
    Family("molmo2", "video", MOLMO2, molmo2, video, collate, extra=types),
]
