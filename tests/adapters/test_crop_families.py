"""Families in crops or packed patches, through their own processors: the cell of a painted box is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image

import vtoken
from tests.mechanism.common import run, subject
from tests.models import FAMILIES
from tests.models.common import BREAK, END, IMG, START, VID
from tests.models.minicpm import SLICE, SLICE_END

from .families import assert_near, block_means, check, check_full_budget, eager, maps_of, quiet, seen
from .pictures import find, painted, tokenizer_of


@dataclass(frozen=True)
class Own:
    """A family with its own processor: the placeholder in a prompt, the size of a picture (width, height), and
    (segment, cell) to be found on it.
    """

    processor: Callable[[], Any]
    placeholder: str
    size: tuple[int, int]
    cells: tuple[tuple[int, int], ...]
    faint: str = ""  # weights that would drown the painted box, by a part of their names

    def prompt(self, image: Image.Image) -> dict[str, torch.Tensor]:
        return dict(
            self.processor()(images=[image], text=[f"w1 w5 {self.placeholder} w6 w7"], return_tensors="pt")
        )


def molmo2():
    marks = {"<im_patch>": IMG, "<im_col>": BREAK, "<im_start>": START, "<im_end>": END, "<im_low>": 114}
    marks |= {"<|image|>": 110, "<|video|>": VID, "<low_res_im_start>": 111}
    words = tokenizer_of(marks | {"<frame_start>": 112, "<frame_end>": 113})
    words.bos_token = "w1"
    size = dict(size={"height": 42, "width": 42}, patch_size=7, pooling_size=[2, 2])
    images = tf.Molmo2ImageProcessor(**size, max_crops=4, overlap_margins=[1, 1])
    videos = tf.Molmo2VideoProcessor(**size, do_sample_frames=False)
    return tf.Molmo2Processor(image_processor=images, video_processor=videos, tokenizer=words)


def minicpm(prefix: str):
    def made():
        names = dict(image_token=IMG, video_token=VID, image_start_token=START, image_end_token=END)
        names |= dict(slice_start_token=SLICE, slice_end_token=SLICE_END)
        names |= dict(image_id_start_token=112, image_id_end_token=113)
        words = tokenizer_of({f"<{name}>": i for name, i in names.items()} | {"\n": BREAK})
        for name in names:
            setattr(words, name, f"<{name}>")
        words.image_token_id, words.video_token_id = IMG, VID
        own = prefix if hasattr(tf, f"{prefix}ImageProcessor") else "MiniCPMV4_6"
        images = getattr(tf, f"{own}ImageProcessor")(patch_size=7, scale_resolution=56, max_slice_nums=4)
        videos = tf.MiniCPMV4_6VideoProcessor(patch_size=7, scale_resolution=56, do_sample_frames=False)
        cls = getattr(tf, f"{prefix}Processor")
        return cls(image_processor=images, video_processor=videos, tokenizer=words)

    return made


def kimi_k25():
    words = tokenizer_of({"<|media_pad|>": IMG, "<|kimi_k25_video_placeholder|>": VID})
    side = dict(patch_size=7, merge_size=2)
    images, videos = tf.Kimi_K25ImageProcessor(**side), tf.Kimi_K25VideoProcessor(**side)
    return tf.Kimi_K25Processor(images, words, videos)


def deepseek_vl(prefix: str, **size):
    def made():
        words = tokenizer_of({"<image>": IMG})
        words.image_token = "<image>"
        images = getattr(tf, f"{prefix}ImageProcessor")(size={"height": 28, "width": 28}, **size)
        return getattr(tf, f"{prefix}Processor")(images, words, num_image_tokens=16)

    return made


def janus():
    words = tokenizer_of({"<image>": IMG, "<boi>": START, "<eoi>": END})
    words.image_token, words.boi_token, words.eoi_token = "<image>", "<boi>", "<eoi>"
    images = tf.JanusImageProcessor(size={"height": 28, "width": 28}, min_size=14)
    return tf.JanusProcessor(images, words, num_image_tokens=16)


def qianfan_ocr():
    words = tokenizer_of({"<context>": IMG, "<start>": START, "<end>": END, "<image>": BREAK})
    for name, token in (("start_image", START), ("end_image", END), ("context_image", IMG)):
        setattr(words, f"{name}_token", f"<{name.partition('_')[0]}>")
        setattr(words, f"{name}_token_id", token)
    images = tf.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, max_patches=4)
    return tf.QianfanOCRProcessor(images, words, image_seq_length=16)


def hyperclovax():
    words = tokenizer_of({"<|image_pad|>": IMG, "<|video_pad|>": VID})
    size = dict(patch_size=7, merge_size=2, size={"shortest_edge": 14 * 14, "longest_edge": 84 * 168})
    images, videos = tf.Qwen2VLImageProcessor(**size), tf.Qwen2VLVideoProcessor(**size)
    return tf.HyperCLOVAXVisionV2Processor(images, words, videos)


SLICED = ("<image_token>", (112, 112), ((0, 0), (0, 1), (1, 0), (2, 3), (3, 2), (4, 3)))
OWN = {
    "minicpm_ocr": Own(
        minicpm("MiniCPMOcr"), "<image_token>", (112, 112), ((0, 0), (0, 14), (1, 0), (2, 5), (4, 15))
    ),
    "qianfan_ocr": Own(qianfan_ocr, "<image>", (56, 56), ((0, 0), (0, 7), (0, 13))),
    "molmo2": Own(molmo2, "<|image|>", (70, 70), ((0, 0), (0, 5), (1, 0), (1, 9), (1, 12), (1, 24))),
    "deepseek_vl": Own(deepseek_vl("DeepseekVL"), "<image>", (28, 28), ((0, 0), (0, 7), (0, 13))),
    "deepseek_vl_hybrid": Own(
        deepseek_vl("DeepseekVLHybrid", high_res_size={"height": 56, "width": 56}),
        "<image>",
        (56, 56),
        ((0, 0), (0, 7), (0, 13)),
        faint="aligner.high_res_vision_proj",
    ),
    "hyperclovax_vision_v2": Own(hyperclovax, "<|image_pad|>", (70, 42), ((0, 0), (0, 4), (0, 7), (0, 14))),
    "kimi_k25": Own(kimi_k25, "<|media_pad|>", (70, 42), ((0, 0), (0, 4), (0, 7), (0, 14))),
    "janus": Own(janus, "<image>", (28, 28), ((0, 0), (0, 7), (0, 13))),
    "minicpmv4_6": Own(minicpm("MiniCPMV4_6"), *SLICED),
    "minicpmv4_7": Own(minicpm("MiniCPMV4_7"), *SLICED),
}
PLACES = [(name, *place) for name, own in OWN.items() if name in FAMILIES for place in own.cells]


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.partition("/")[0] in OWN])
def test_strategies(name):
    """Left-padded rows with one and two items of different sizes, and a row of text."""
    family = FAMILIES[name]
    for strategy in ("random", "pool"):
        check(name, strategy, family.prompt([row[: family.per_prompt] for row in ([0], [1, 2], [])]))


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.partition("/")[0] in OWN])
def test_full_budget_is_the_unpatched_model(name):
    check_full_budget(name)


@pytest.mark.parametrize(("name", "segment", "cell"), PLACES)
def test_a_painted_box_is_found_at_its_cell(name, segment, cell):
    own, model = OWN[name], quiet(name)
    for weight in (p for key, p in model.named_parameters() if own.faint and own.faint in key):
        weight.data *= 0.02
    plain = own.prompt(painted(own.size, None))
    (item,) = seen(subject(name), plain, received=False, keys=False)
    width, height = own.size
    boxes = item.segments[segment].cell_boxes() * torch.tensor([width, height, width, height])
    marked = own.prompt(painted(own.size, tuple(boxes[cell].round().int().tolist())))
    first = sum(s.size for s in item.segments[:segment])
    assert find(model, plain, marked, segment)[0] == first + cell


@pytest.mark.parametrize("name", [n for n in ("minicpmv4_6/video", "minicpmv4_7/video") if n in FAMILIES])
def test_frames_that_follow_one_another_are_a_video(name):
    items = seen(subject(name), FAMILIES[name].prompt([[0], [1, 2]]), received=False, keys=False)
    kinds = [[s.kind for s in item.segments] for item in items]
    assert kinds == [["frame"] * 3, ["frame"] * 3, ["frame", "crop", "crop"] * 3]


# -- queries -------------------------------------------------------------------------------------------------
QUERIES = {"aria": [1, 3, 2], "idefics2": [1, 1, 1], "deepseek_ocr2": [1, 3, 1]}  # views per image


@pytest.mark.parametrize("name", [n for n in QUERIES if n in FAMILIES])
def test_queries_have_no_place(name):
    """Every view of an image is a row of queries; separators are none, and nothing is drawn."""
    inputs = FAMILIES[name].prompt([[0], [1, 2]])
    items = seen(subject(name), inputs, received=False, keys=False)
    assert [len(item.segments) for item in items] == QUERIES[name]
    assert {s.kind for item in items for s in item.segments} == {"queries"}
    separators = int(name == "deepseek_ocr2")
    assert [len(item.separator_rows) for item in items] == [separators] * 3
    check(name, "divprune", inputs)
    with vtoken.applied(subject(name), "random", budget=0.5):
        run(subject(name), inputs, 1)
        with pytest.raises(ValueError, match=r"have no place on it: draw .*\.$"):
            vtoken.visualize(painted((56, 56), None), vtoken.report(subject(name)).visuals[0])


# -- values of towers ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("name", [n for n in ("kimi_k25", "kimi_k25/video") if n in FAMILIES])
def test_received_attention_of_kimi_is_that_of_the_eager_maps(name, layer):
    """The mean over the frames of a chunk, which see each other, and over the patches of a cell."""
    inputs = FAMILIES[name].prompt([[0], [1, 2]])
    chunks = inputs["video_grid_thw" if name.endswith("video") else "image_grid_thw"].tolist()
    maps = maps_of(name, inputs, eager(name).base_model.vision_tower.layers[layer].attn)
    want = [
        block_means(m.mean((0, 1, 2)).view(t, h * w).mean(0), h, w, 2)
        for m, (t, h, w) in zip(maps, chunks, strict=True)
    ]
    items = seen(subject(name), inputs, layer=layer)
    got = torch.cat([item.received_attention(layer).flatten() for item in items])
    assert_near(got, torch.cat(want))


@pytest.mark.skipif("kimi_k25/video" not in FAMILIES, reason="it does not run in this transformers")
def test_chunks_of_one_size_are_a_video():
    items = seen(subject("kimi_k25"), FAMILIES["kimi_k25/video"].prompt([[0], [1, 2]]), keys=False)
    assert [len(item.segments) for item in items] == [2, 1, 2]
