"""MiniCPM-V 4.6 and 4.7: patches in a row, one view of the whole picture and slices between marks."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

from .common import BREAK, END, IMG, LM, ROW, START, VID, VIT, Family, Item, pixels
from .hybrid import KINDS, LINEAR
from .qwen import ROPE, token_types

PATCH, SLICE, SLICE_END = 7, ROW, ROW + 1
# (rows, columns) of slices, patches (h, w) of the whole view and of a slice
IMAGES = [((0, 0), (8, 16), None), ((1, 2), (8, 12), (8, 8)), ((2, 2), (8, 8), (8, 12))]
VIDEOS = [((0, 0), (8, 12), None), ((0, 0), (12, 8), None), ((1, 2), (8, 8), (8, 8))]  # of a frame
FRAMES = 3


def minicpm(cls: str, **marks: int):
    def config():
        rope = dict(ROPE, mrope_interleaved=True, partial_rotary_factor=1.0)
        lm = dict(**LM, head_dim=8, rope_parameters=rope, layer_types=KINDS, **LINEAR)
        tower = dict(**VIT, image_size=112, patch_size=PATCH)
        return getattr(tf, cls)(
            vision_config=tower,
            text_config=dict(model_type="qwen3_5_text", **lm),
            insert_layer_id=1,
            image_token_id=IMG,
            video_token_id=VID,
            **marks,
        )

    return config


def sliced(kind: tuple, token: int, side: int = 4) -> tuple[list[int], list[tuple[int, int]]]:
    """The placeholders of a picture, and the patches of its parts."""
    (rows, columns), whole, part = kind
    sizes, ids = [whole], [START, *[token] * (whole[0] * whole[1] // side**2), END]
    for r in range(rows):
        for _ in range(columns):
            sizes.append(part)
            ids += [SLICE, *[token] * (part[0] * part[1] // side**2), SLICE_END]
        ids += [BREAK] if r < rows - 1 else []
    return ids, sizes


def row_of_patches(sizes: list[tuple[int, int]], seed: int) -> Tensor:
    return pixels(1, 3, PATCH, PATCH * sum(h * w for h, w in sizes), seed=seed)


def image(i: int, n: int) -> Item:
    ids, sizes = sliced(IMAGES[i], IMG)
    return Item(ids, dict(pixel_values=row_of_patches(sizes, i), target_sizes=torch.tensor(sizes)))


def video(i: int, n: int) -> Item:
    ids, sizes = sliced(VIDEOS[i], VID)
    ids, sizes = ids * FRAMES, sizes * FRAMES
    values = dict(pixel_values_videos=row_of_patches(sizes, i), target_sizes_videos=torch.tensor(sizes))
    return Item(ids, values)


def ocr_image(i: int, n: int) -> Item:
    """Four times as many tokens of an image a quarter as large."""
    (rows, columns), whole, part = IMAGES[i]
    half = [None if size is None else (size[0] // 2, size[1] // 2) for size in (whole, part)]
    ids, sizes = sliced(((rows, columns), *half), IMG, side=2)
    return Item(ids, dict(pixel_values=row_of_patches(sizes, i), target_sizes=torch.tensor(sizes)))


def collate(rows: list[list[Item]]) -> dict[str, Tensor]:
    items = [item.tensors for row in rows for item in row]
    names = items[0] if items else ()
    return {key: torch.cat([t[key] for t in items], -1 if key.startswith("pixel") else 0) for key in names}


V4_6 = minicpm("MiniCPMV4_6Config")
V4_7 = minicpm(
    "MiniCPMV4_7Config",
    image_start_id=START,
    image_end_id=END,
    slice_start_id=SLICE,
    slice_end_id=SLICE_END,
    newline_id=BREAK,
)


def _family(version: str, modality: str, config, item) -> Family:
    cls = f"MiniCPMV{version}ForConditionalGeneration"
    extra = dict(extra=token_types) if version == "4_7" else {}
    broken = ("5.17",) if version == "4_6" else ()  # it reads slices of one size only
    return Family(
        f"minicpmv{version}", modality, cls, config, item, collate, inside=False, broken=broken, **extra
    )


FAMILIES = [
    _family("4_6", "image", V4_6, image),
    _family("4_6", "video", V4_6, video),
    _family("4_7", "image", V4_7, image),
    _family("4_7", "video", V4_7, video),
    Family(
        "minicpm_ocr",
        "image",
        "MiniCPMOcrForConditionalGeneration",
        minicpm("MiniCPMOcrConfig"),
        ocr_image,
        collate,
        inside=False,
    ),
]
