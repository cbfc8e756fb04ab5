"""Video-LLaMA 3, PaddleOCR-VL, HunYuan-VL and ERNIE 4.5 VL: geometry, tower values, the processors' prompts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor

import vtoken
from tests.mechanism.common import clean, subject
from tests.models import FAMILIES
from tests.models.common import END, IMG, START, VID
from tests.models.ernie import VIDEOS as PAIRS
from tests.models.ernie import types
from tests.models.packed import still_cells
from tests.models.qwen import IMAGES, VIDEOS

from .families import STRATEGIES, assert_near, check, check_full_budget, eager, maps_of, quiet, seen
from .pictures import find, painted, tokenizer_of

NAMES = ("video_llama_3", "paddleocr_vl", "hunyuan_vl", "ernie4_5_vl_moe")
BOTH = (*NAMES, "video_llama_3/video", "ernie4_5_vl_moe/video")
SIZE = {"shortest_edge": 14 * 14, "longest_edge": 84 * 168}
SIDE = {"video_llama_3": 1}  # patches along a side of a cell, two for the others


def video_llama_3():
    made = tokenizer_of({"<image>": IMG, "<video>": VID})
    made.image_token, made.video_token, made.image_token_id, made.video_token_id = (
        "<image>",
        "<video>",
        IMG,
        VID,
    )
    images = tf.VideoLlama3ImageProcessor(patch_size=7, merge_size=1, size=SIZE)
    videos = tf.VideoLlama3VideoProcessor(patch_size=7, merge_size=2, size=SIZE)
    return tf.VideoLlama3Processor(images, made, videos)


def paddleocr_vl():
    made = tokenizer_of({"<image>": IMG})
    made.image_token, made.image_token_id = "<image>", IMG
    return tf.PaddleOCRVLProcessor(tf.PaddleOCRVLImageProcessor(patch_size=7, merge_size=2, size=SIZE), made)


def hunyuan_vl():
    made = tokenizer_of({"<image>": IMG, "<start>": START, "<end>": END})
    made.image_token, made.image_token_id = "<image>", IMG
    made.image_start_token, made.image_start_token_id = "<start>", START
    made.image_end_token, made.image_end_token_id = "<end>", END
    return tf.HunYuanVLProcessor(tf.HunYuanVLImageProcessor(patch_size=7, merge_size=2, size=SIZE), made)


def ernie4_5_vl_moe():
    """Its processor reads a font from the network: the image processor alone, and the prompt by hand."""
    images = tf.Ernie4_5_VLMoeImageProcessor(patch_size=7, merge_size=2, size=SIZE)

    def process(images_: list, text: list[str], return_tensors: str) -> dict[str, Tensor]:
        out = dict(images(images_, return_tensors=return_tensors))
        count = int(out["image_grid_thw"].prod()) // 4
        ids = torch.tensor([[5, START, *[IMG] * count, END, 7]])
        mask = torch.ones_like(ids)
        return out | dict(input_ids=ids, attention_mask=mask) | types(ids, mask)

    return lambda images, **kwargs: process(images, **kwargs)


PROCESSORS: dict[str, Callable] = {
    f.__name__: f for f in (video_llama_3, paddleocr_vl, hunyuan_vl, ernie4_5_vl_moe)
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", BOTH)
def test_strategies(name, strategy):
    """Left-padded rows with one and two items of different sizes, and a row of text."""
    check(name, strategy, FAMILIES[name].prompt([[0], [1, 2], []]), **STRATEGIES[strategy])


@pytest.mark.parametrize("name", BOTH)
def test_full_budget_is_the_unpatched_model(name):
    check_full_budget(name)


# -- geometry ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cell", [(0, 0), (0, 9), (2, 3), (5, 9)])
@pytest.mark.parametrize("name", NAMES)
def test_a_marked_patch_is_found_at_its_cell(name, cell):
    """A white square in a picture of 6 x 10 cells, through the family's own processor."""
    (row, column), side = cell, 7 * SIDE.get(name, 2)
    box = (column * side, row * side, column * side + side, row * side + side)
    text = "w5 <start><image><end> w7" if name == "hunyuan_vl" else "w5 <image> w7"
    plain, marked = (
        dict(PROCESSORS[name]()(images=[painted((10 * side, 6 * side), b)], text=[text], return_tensors="pt"))
        for b in (None, box)
    )
    found, item = find(quiet(name), plain, marked)
    assert item.segments[0].grid == (6, 10) and divmod(found, 10) == cell


def test_marks_and_newlines_of_hunyuan_vl_are_no_patches():
    items = seen(subject("hunyuan_vl"), FAMILIES["hunyuan_vl"].batch("ragged"), received=False, keys=False)
    for item, (_, h, w) in zip(items, IMAGES, strict=True):
        rows = [[*range(r * w // 2, (r + 1) * w // 2), -1] for r in range(h // 2)]
        assert item.cells.tolist() == [-1, *[cell for row in rows for cell in row], -1]


def test_cells_that_the_processor_of_video_llama_3_left_out():
    items = seen(
        subject("video_llama_3/video"),
        FAMILIES["video_llama_3/video"].prompt([[1], [2, 0]]),
        received=False,
        keys=False,
    )
    for item, i in zip(items, (1, 2, 0), strict=True):
        kept = still_cells(i)
        assert [s.grid for s in item.segments] == [(VIDEOS[i][1] // 2, VIDEOS[i][2] // 2)] * VIDEOS[i][0]
        assert item.cells.tolist() == kept.flatten().nonzero()[:, 0].tolist()
        assert [s.fed for s in item.segments] == kept.sum(1).tolist()


def test_pairs_of_frames_of_ernie():
    """A mark in either frame of a pair is found in the pair's segment."""
    name = "ernie4_5_vl_moe/video"
    plain = FAMILIES[name].prompt([[2]])
    t, h, w = PAIRS[2]
    model = quiet(name)
    (before,) = seen(model, plain, received=False, keys=False)
    assert [s.grid for s in before.segments] == [(h // 2, w // 2)] * (t // 2)
    for frame in (2, 3):
        pixels = plain["pixel_values_videos"].clone()
        pixels[frame * h * w + 8 : frame * h * w + 12] += 3  # the third cell's patches
        (after,) = seen(model, plain | dict(pixel_values_videos=pixels), received=False, keys=False)
        change = (after.features - before.features).norm(dim=-1)
        assert int(after.cells[change.argmax()]) == 1 * h * w // 4 + 2


# -- scores --------------------------------------------------------------------------------------------------
def received_by_hand(name: str, inputs: dict, layer: int) -> Tensor:
    """(patches,) attention received, frame by frame, from the eager maps."""
    base = eager(name).base_model
    tower = getattr(base, "visual", None) or getattr(base, "vision_tower", None) or base.vision_model
    tower = getattr(tower, "vision_model", tower)
    if "ernie" in name:
        attention = tower.blocks[layer].attn
    else:
        attention = getattr(tower, "encoder", tower).layers[layer].self_attn
    return torch.cat([m.mean((0, 1, 2)) for m in maps_of(name, inputs, attention)])


@pytest.mark.parametrize("name", BOTH)
def test_received_attention_is_that_of_the_eager_maps(name):
    inputs, layer = FAMILIES[name].prompt([[0], [1, 2]]), 2
    items = seen(subject(name), inputs, layer=layer)
    got = torch.cat([item.received_attention(layer).flatten() for item in items])
    patches = received_by_hand(name, inputs, layer)
    grids = PAIRS if "ernie" in name and "video" in name else VIDEOS if "video" in name[5:] else IMAGES
    if name == "video_llama_3":
        want = patches
    elif "paddle" in name or "hunyuan" in name:  # row by row
        maps = patches.split([h * w for _, h, w in IMAGES])
        each = [m.view(h // 2, 2, w // 2, 2).mean((1, 3)) for m, (_, h, w) in zip(maps, IMAGES, strict=True)]
        want = torch.cat([e.flatten() for e in each])
    else:
        want = patches.view(-1, 4).mean(1)
    if name == "ernie4_5_vl_moe/video":
        maps = want.split([t * h * w // 4 for t, h, w in grids])
        pairs = [m.view(t // 2, 2, -1).mean(1).flatten() for m, (t, _, _) in zip(maps, grids, strict=True)]
        want = torch.cat(pairs)
    assert_near(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_list_strategies_knows_what_fits(name):
    fit = set(vtoken.list_strategies(model=clean(name)))
    assert {"random", "pool", "visionzip"} <= fit
    assert ("fastv" in fit) == FAMILIES[name].inside == (name in ("video_llama_3", "paddleocr_vl"))
    if name == "hunyuan_vl":
        with pytest.raises(ValueError, match=r"key_layernorm, query_layernorm: use"):
            vtoken.patch(subject(name), "fastv")
