"""GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR: geometry, tower values, prompts of their own processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers.video_utils import VideoMetadata

import vtoken
from tests.mechanism.common import clean, subject
from tests.models import FAMILIES
from tests.models.common import BREAK, END, IMG, ROW, START, VID
from tests.models.qwen import IMAGES, VIDEOS

from .families import STRATEGIES, assert_near, check, check_attention_rows, check_full_budget, quiet, seen
from .pictures import find, painted, tokenizer_of
from .test_qwen_families import received_by_hand

NAMES = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
BOTH = [f"{name}{kind}" for name in NAMES for kind in ("", "/video")]
PIXELS = dict(size={"shortest_edge": 14 * 14 * 2, "longest_edge": 84 * 168 * 2}, patch_size=7, merge_size=2)
SPECIAL = {
    "<|image|>": IMG, "<|video|>": VID, "<|begin_of_image|>": START, "<|end_of_image|>": END,
    "<|begin_of_video|>": BREAK, "<|end_of_video|>": ROW,
}  # fmt: skip


def processor(name: str):
    prefix = "Glm46V" if name == "glm46v" else "Glm4v"
    return getattr(transformers, f"{prefix}Processor")(
        image_processor=getattr(transformers, f"{prefix}ImageProcessor")(**PIXELS),
        video_processor=getattr(transformers, f"{prefix}VideoProcessor")(
            **PIXELS, do_sample_frames=False, temporal_patch_size=2
        ),
        tokenizer=tokenizer_of(SPECIAL),
    )


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
    (row, column), make = cell, processor(name)
    box = (column * 14, row * 14, column * 14 + 14, row * 14 + 14)
    plain, marked = (
        make(images=[painted((140, 84), b)], text="w5 w6 <|begin_of_image|> <|image|> <|end_of_image|> w7",
             return_tensors="pt")
        for b in (None, box)
    )  # fmt: skip
    found, item = find(quiet(name), plain, marked)
    assert item.segments[0].grid == (6, 10) and divmod(found, 10) == cell


@pytest.mark.parametrize("name", NAMES)
def test_segments_of_videos(name):
    items = seen(subject(name), FAMILIES[f"{name}/video"].prompt([[1], [2, 0]]), received=False, keys=False)
    for item, (t, h, w) in zip(items, (VIDEOS[1], VIDEOS[2], VIDEOS[0]), strict=True):
        assert item.modality == "video" and [s.kind for s in item.segments] == ["frame"] * t
        assert {s.grid for s in item.segments} == {(h // 2, w // 2)}
        assert item.cells.tolist() == list(range(t * h * w // 4))


@pytest.mark.parametrize("name", NAMES)
def test_a_marked_frame_of_a_video(name):
    """Two videos of the processor, the second of 3 x 2 frames with a white square in the last two."""
    make, clip = processor(name), np.full((6, 56, 84, 3), 90, np.uint8)
    marked = clip.copy()
    marked[4:, 28:42, 70:84] = 255
    times = [VideoMetadata(total_num_frames=6, fps=2.0, frames_indices=list(range(6)))] * 2
    text = [
        "w5 <|begin_of_video|> <|video|> <|end_of_video|> w7 <|begin_of_video|> <|video|> <|end_of_video|>"
    ]
    before, after = (
        seen(
            quiet(name),
            make(videos=[clip, v], video_metadata=times, text=text, return_tensors="pt"),
            received=False,
            keys=False,
        )
        for v in (clip, marked)
    )
    assert [s.grid for s in after[1].segments] == [(4, 6)] * 3
    assert torch.equal(before[0].features, after[0].features)
    change = (after[1].features - before[1].features).norm(dim=-1)
    assert int(after[1].cells[change.argmax()]) == 2 * 24 + 2 * 6 + 5


# -- scores --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_received_attention_is_that_of_the_eager_maps(name):
    inputs = FAMILIES[name].prompt([[0], [1, 2]])
    items = seen(subject(name), inputs, layer=2)
    for item, want in zip(items, received_by_hand(name, inputs, 2, IMAGES), strict=True):
        assert_near(item.received_attention(2), want)
    videos = FAMILIES[f"{name}/video"].prompt([[0, 1], [2]])
    items = seen(subject(f"{name}/video"), videos, layer=2)
    for item, want in zip(items, received_by_hand(name, videos, 2, VIDEOS), strict=True):
        assert_near(item.received_attention(2), want)


@pytest.mark.parametrize("name", NAMES)
def test_llms_that_turn_pairs_are_refused_inside(name):
    """The rotary embedding of the tower, in the same file, turns halves."""
    fit = set(vtoken.list_strategies(model=clean(name)))
    assert ("fastv" in fit) == (name == "glm4v_moe")
    assert ("stc_cacher" in fit) == (name != "glm_ocr")  # norms after the projections
    if name != "glm4v_moe":
        with pytest.raises(ValueError, match="turn the two halves"):
            vtoken.patch(subject(name), "fastv")


def test_attention_rows_of_glm4v_moe_are_those_of_the_eager_model():
    check_attention_rows("glm4v_moe")
