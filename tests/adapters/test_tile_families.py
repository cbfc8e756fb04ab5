"""Aya Vision, Command A Vision, Perception LM, FastVLM, Ovis2, GOT-OCR2, LightOnOCR: geometry and answers.

Every picture and every prompt comes from the family's own processor, built without files.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor

import vtoken
from tests.mechanism.common import clean, run, subject
from tests.models import FAMILIES
from tests.models.cohere import GLOBAL
from tests.models.common import BREAK, END, IMG, ROW, START, VID
from tests.models.ocr import COLUMN, GRID, ovis2_prompt
from tests.models.siglip import GRIDS, TILES
from vtoken.adapters.registry import list_families

from .families import (
    STRATEGIES,
    assert_near,
    block_means,
    check,
    check_attention_rows,
    check_full_budget,
    eager,
    maps_of,
    quiet,
    seen,
)
from .pictures import find, painted, tokenizer_of

ALL = ("aya_vision", "cohere2_vision", "perception_lm", "fast_vlm", "ovis2", "got_ocr2", "lighton_ocr")
NAMES = [name for name in ALL if name in FAMILIES]
READ = ("aya_vision", "cohere2_vision", "ovis2")  # towers whose attention is read
ROTATED = [n for n in NAMES if n not in ("aya_vision", "cohere2_vision")]  # LLMs that turn halves
SQUARE = {"height": 56, "width": 56}


def aya_vision():
    tags = {f"TILE_{i}": ROW + i for i in range(1, 9)} | {"TILE_GLOBAL": GLOBAL}
    special = {"<|START_OF_IMG|>": START, "<|END_OF_IMG|>": END, "<|IMG_PATCH|>": IMG, "<image>": VID}
    images = tf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=6)
    return tf.AyaVisionProcessor(
        images, tokenizer_of(special | tags), patch_size=7, img_size=56, downsample_factor=2
    )


def cohere2_vision():
    made = tokenizer_of({"<image>": IMG, "<boi>": START, "<eoi>": END, "<break>": BREAK})
    made.image_token, made.boi_token, made.eoi_token = "<image>", "<boi>", "<eoi>"
    made.img_line_break_token, made.image_token_id = "<break>", IMG
    images = tf.Cohere2VisionImageProcessor(size=SQUARE, patch_size=4, max_patches=6)
    return tf.Cohere2VisionProcessor(images, made)


def perception_lm():
    made = tokenizer_of({"<image>": IMG, "<video>": VID})
    made.image_token, made.video_token, made.image_token_id, made.video_token_id = (
        "<image>",
        "<video>",
        IMG,
        VID,
    )
    videos = tf.PerceptionLMVideoProcessor(size={"height": 28, "width": 28}, do_sample_frames=False)
    images = tf.PerceptionLMImageProcessor(tile_size=28, max_num_tiles=4)
    return tf.PerceptionLMProcessor(
        image_processor=images, tokenizer=made, patch_size=7, pooling_ratio=2, video_processor=videos
    )


def fast_vlm():
    made = tokenizer_of({"<image>": IMG})
    made.image_token, made.image_token_id = "<image>", IMG
    images = tf.CLIPImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 256, "width": 256})
    return tf.LlavaProcessor(
        images,
        made,
        patch_size=64,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
    )


def ovis2():
    special = {
        "<IMG_START>": START,
        "<IMG_GRID>": GRID,
        "<IMG_COL>": COLUMN,
        "<IMG_ROW>": ROW,
        "<IMG_END>": END,
    }
    images = tf.Ovis2ImageProcessor(size=SQUARE, crop_to_patches=True, use_covering_area_grid=False)
    made = tokenizer_of({"<IMG_ATOM>": IMG, "<image>": VID} | special)
    return tf.Ovis2Processor(images, made, image_seq_length=16)


def got_ocr2():
    images = tf.GotOcr2ImageProcessor(size={"height": 112, "width": 112}, crop_to_patches=True, max_patches=6)
    return tf.GotOcr2Processor(images, tokenizer_of({"<imgpad>": IMG, "<img>": START, "</img>": END}))


def lighton_ocr():
    made = tokenizer_of({"<image>": IMG, "<break>": BREAK, "<end>": END})
    made.image_token, made.image_break_token, made.image_end_token = "<image>", "<break>", "<end>"
    made.image_token_id, made.image_break_token_id, made.image_end_token_id = IMG, BREAK, END
    images = tf.PixtralImageProcessor(size={"longest_edge": 168}, patch_size={"height": 14, "width": 14})
    return tf.LightOnOcrProcessor(images, made, patch_size=7, spatial_merge_size=2)


PROCESSORS: dict[str, Callable] = {
    f.__name__: f for f in (aya_vision, cohere2_vision, perception_lm, fast_vlm, ovis2, got_ocr2, lighton_ocr)
}
# pixels of a cell, cells along a tile, tiles of a picture of two tiles side by side, the first crop
PLACES = {
    "aya_vision": (14, (4, 4), 3, 0),
    "cohere2_vision": (14, (4, 4), 3, 0),
    "perception_lm": (14, (2, 2), 3, 1),
    "fast_vlm": (64, (4, 4), 1, 0),
    "ovis2": (14, (4, 4), 3, 1),
    "got_ocr2": (28, (4, 4), 3, 0),
    "lighton_ocr": (14, (4, 8), 1, 0),
}


def processed(name: str, box: tuple[int, int, int, int] | None) -> dict[str, Tensor]:
    """A picture of two tiles side by side; one tile where the family has no others."""
    cell, (rows, columns), tiles, _ = PLACES[name]
    size = ((2 if tiles > 1 else 1) * cell * columns, cell * rows)
    extra = dict(num_image_tokens=16, crop_to_patches=True, max_patches=6) if name == "got_ocr2" else {}
    text = "w5 <imgpad> w7" if name == "got_ocr2" else "w5 <image> w7"
    return dict(PROCESSORS[name]()(images=[painted(size, box)], text=[text], return_tensors="pt", **extra))


def local(name: str):
    """A model of whose tower every output sees little more than its own place."""
    model = quiet(name)
    if name == "fast_vlm":  # random convolutions of any depth see everything: averages in place of them
        tower = model.base_model.vision_tower.timm_model
        tower.forward_features = lambda pixels: F.avg_pool2d(pixels, 64).mean(1, True).expand(-1, 64, 4, 4)
    return model


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_strategies(name, strategy):
    """Left-padded rows with one and two images, and a row of text."""
    if "score" in STRATEGIES[strategy] and name not in (*READ, "lighton_ocr"):
        pytest.skip("the tower's attention is not read")
    check(name, strategy, FAMILIES[name].prompt([[0], [1, 2], []]), **STRATEGIES[strategy])


@pytest.mark.parametrize("name", NAMES)
def test_full_budget_is_the_unpatched_model(name):
    check_full_budget(name)


# -- geometry ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cell", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_a_marked_patch_is_found_at_its_cell(name, cell):
    """A white square in the last crop of a picture: its token changes most."""
    side, (rows, columns), tiles, first = PLACES[name]
    row, column = cell[0] * (rows - 1), cell[1] * (columns - 1)
    tile = 1 if tiles > 1 else 0
    left, top = (tile * columns + column) * side, row * side
    plain, marked = (processed(name, b) for b in (None, (left, top, left + side, top + side)))
    found, item = find(local(name), plain, marked, first + tile)
    assert [s.grid for s in item.segments] == [(rows, columns)] * tiles
    assert found == ((first + tile) * rows + row) * columns + column


def test_crops_of_ovis2():
    items = seen(subject("ovis2"), FAMILIES["ovis2"].prompt([[0, 1], [2]]), received=False, keys=False)
    assert [[s.kind for s in item.segments] for item in items] == [
        ["image"], ["thumbnail", "crop", "crop"], ["thumbnail", "crop", "crop", "crop"]
    ]  # fmt: skip
    assert [s.place for s in items[1].segments[1:]] == [(0, 0), (1, 0)]
    assert [s.place for s in items[2].segments[1:]] == [(0, 0), (0, 1), (0, 2)]
    assert items[2].segments[2].box == (1 / 3, 0, 2 / 3, 1)
    assert all(item.cells.tolist() == list(range(len(item))) for item in items)
    assert processed("ovis2", None)["input_ids"][0].tolist() == [5, *ovis2_prompt(1, 2), 7]


@pytest.mark.parametrize("name", ["aya_vision", "cohere2_vision", "got_ocr2"])
def test_tiles_of_one_image_are_joined(name):
    items = seen(subject(name), FAMILIES[name].prompt([[0, 1], [2]]), received=False, keys=False)
    assert [len(item.segments) for item in items] == TILES
    for item in items:
        assert item.cells.tolist() == list(range(len(item))) and {s.grid for s in item.segments} == {(4, 4)}


def test_sizes_of_lighton_ocr():
    items = seen(subject("lighton_ocr"), FAMILIES["lighton_ocr"].batch("ragged"), received=False, keys=False)
    assert [item.segments[0].grid for item in items] == GRIDS


# -- scores --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", READ)
def test_received_attention_is_that_of_the_eager_maps(name):
    inputs, layer = FAMILIES[name].prompt([[0], [1, 2]]), 2
    items = seen(subject(name), inputs, layer=layer)
    tower = eager(name).base_model.vision_tower
    layers = (
        tower.transformer.encoder.layers
        if name == "ovis2"
        else getattr(tower, "vision_model", tower).encoder.layers
    )
    (maps,) = maps_of(name, inputs, getattr(layers[layer], "self_attn", None) or layers[layer].attention)
    got = torch.cat([item.received_attention(layer) for item in items])
    want = torch.stack([block_means(m.mean((0, 1)), 8, 8, 2) for m in maps])
    assert_near(got, want)


@pytest.mark.parametrize("name", ROTATED)
def test_attention_rows_are_those_of_the_eager_model(name):
    check_attention_rows(name)


@pytest.mark.parametrize("name", NAMES)
def test_list_strategies_knows_what_fits(name):
    fit = set(vtoken.list_strategies(model=clean(name)))
    assert name in list_families() and {"random", "uniform", "pool"} <= fit
    assert ("visionzip" in fit) == (name in (*READ, "lighton_ocr", "perception_lm"))
    assert ("fastv" in fit) == (name in ROTATED)
    if name == "perception_lm":  # its tower has a class token
        assert "vtc_cls" in fit
        return
    with pytest.raises(ValueError, match="use "):
        vtoken.patch(subject(name), "vtc_cls")


@pytest.mark.parametrize("name", NAMES)
def test_wrong_number_of_placeholders(name):
    inputs = FAMILIES[name].batch("one")
    places = (inputs["input_ids"][0] == IMG).nonzero()[:, 0]
    inputs["input_ids"][0, places[-1]] = 9
    with vtoken.applied(subject(name), "random"), pytest.raises((ValueError, RuntimeError), match="tokens"):
        run(subject(name), inputs, 1)
    run(subject(name), FAMILIES[name].batch("one"), 1)
