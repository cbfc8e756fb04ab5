"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its MoE: strategy inputs and generated answers."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from transformers.vision_utils import get_vision_window_index

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from tests.models.common import END, IMG, START, VID, left_pad, text
from tests.models.qwen import IMAGES, VIDEOS, token_types
from vtoken.strategies import create

from .families import (
    STRATEGIES,
    Probe,
    assert_near,
    check,
    check_full_budget,
    eager,
    expected_mixed,
    loudest,
    maps_of,
    mixed,
    seen,
)

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
BOTH = [f"{name}{kind}" for name in NAMES for kind in ("", "/video")]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", BOTH)
def test_strategies(name, strategy):
    """Left-padded rows with one and two items of different sizes, and a row of text."""
    inputs = FAMILIES[name].prompt([[0], [1, 2], []])
    check(name, strategy, inputs, **STRATEGIES[strategy])


@pytest.mark.parametrize("strategy", ["pool", "hired"])
@pytest.mark.parametrize("name", NAMES)
def test_image_and_video_in_one_prompt(name, strategy):
    inputs = mixed(name, [["i0", "v1"], ["v0", "i1", "i2"], []])
    model = subject(name)
    with patched(model, create(strategy, budget=0.3, **STRATEGIES[strategy])) as spy:
        out = run(model, inputs)
        visuals = vtoken.report(model).visuals
    assert sorted((v.row, v.modality) for v in visuals) == [
        (0, "image"), (0, "video"), (1, "image"), (1, "image"), (1, "video")
    ]  # fmt: skip
    assert_same(out, inputs, expected_mixed(name, inputs, spy.items, visuals))
    dense = run(clean(name), inputs, 1).logits[0]
    assert (out.logits[0] - dense)[:2].abs().amax(1).min() > 1e-2


@pytest.mark.parametrize("name", BOTH)
def test_full_budget_is_the_unpatched_model(name):
    check_full_budget(name)


@pytest.mark.parametrize("name", NAMES)
def test_rope_deltas_are_those_of_the_whole_prompt(name):
    """Positions are computed before anything is dropped, in generate() and in forward()."""
    inputs = mixed(name, [["i0", "v1"], ["i1"]])
    model, deltas = subject(name), []
    for door in ("generate", "forward"):
        for subject_model in (clean(name), model):
            with vtoken.applied(model, "uniform", budget=0.2), torch.no_grad():
                if door == "generate":
                    run(subject_model, inputs, 2)
                else:
                    subject_model(**{k: v.clone() for k, v in inputs.items()})
            deltas.append(subject_model.base_model.rope_deltas)
    assert torch.equal(deltas[0], deltas[1]) and torch.equal(deltas[2], deltas[3])
    assert (deltas[0] != 0).all()


# -- geometry ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_segments(name):
    items = seen(subject(name), mixed(name, [["v1", "i0"], ["v2"]]), received=False, keys=False)
    image, *videos = items
    assert [s.kind for s in image.segments] == ["image"] and image.segments[0].grid == (3, 6)
    for item, (t, h, w) in zip(videos, VIDEOS[1:], strict=True):
        assert item.modality == "video" and [s.kind for s in item.segments] == ["frame"] * t
        assert {s.grid for s in item.segments} == {(h // 2, w // 2)}
        assert item.cells.tolist() == list(range(t * h * w // 4))
        known = name == "qwen2_5_vl"  # the only one that is told seconds; a frame is one temporal patch
        step = 1.0 + VIDEOS.index((t, h, w))
        assert [s.seconds for s in item.segments] == [step * i if known else None for i in range(t)]


def processed(image: Image.Image) -> dict[str, torch.Tensor]:
    processor = transformers.Qwen2VLImageProcessor(
        patch_size=7,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 14 * 14, "longest_edge": 84 * 168},
    )
    out = processor([image], return_tensors="pt")
    n = int(out["image_grid_thw"].prod()) // 4
    ids, mask = left_pad([[*text(3, 1), START, *[IMG] * n, END, *text(4, 2)]])
    return dict(input_ids=ids, attention_mask=mask, **out, **token_types(ids, mask))


@pytest.mark.parametrize("cell", [(0, 0), (0, 9), (2, 3), (5, 1), (5, 9)])
@pytest.mark.parametrize("name", NAMES)
def test_a_marked_patch_is_found_at_its_cell(name, cell):
    """A white square in a picture of 6 x 10 cells, through the family's own image processor."""
    (row, column), size = cell, (140, 84)
    plain = Image.new("RGB", size, (90, 90, 90))
    marked = plain.copy()
    ImageDraw.Draw(marked).rectangle(
        (column * 14, row * 14, column * 14 + 13, row * 14 + 13), fill=(255, 255, 255)
    )
    model = subject(name)
    (before,), (after,) = (seen(model, processed(p), received=False, keys=False) for p in (plain, marked))
    assert after.segments[0].grid == (6, 10)
    found = loudest(before, after)
    assert divmod(found, 10) == cell
    with vtoken.applied(model, Probe(budget=0.5, received=False, keys=False, mark=(found,))):
        run(model, processed(marked), 1)
        visual = vtoken.report(model).visuals[0]
    assert visual.cells[visual.keep].tolist() == [row * 10 + column]
    assert visual.tokens_out == 1


# -- scores --------------------------------------------------------------------------------------------------
def received_by_hand(
    name: str, inputs: dict, layer: int, grids: list[tuple[int, int, int]]
) -> list[torch.Tensor]:
    """Per item (frames, cells), from the eager maps of every frame (every window in the windowed layers of
    Qwen2.5-VL).
    """
    tower = eager(name).base_model.visual
    maps = maps_of(name, inputs, tower.blocks[layer].attn)
    per_patch = torch.cat([m.mean((0, 1, 2)) for m in maps])
    blocks = per_patch.view(-1, 4).mean(1)
    if hasattr(tower, "fullatt_block_indexes"):
        order, _ = get_vision_window_index(torch.tensor(grids), 2, tower.window_size, 7)
        assert not torch.equal(order, order.sort().values)
        blocks = torch.zeros_like(blocks).scatter(0, order, blocks)
    parts = blocks.split([t * h * w // 4 for t, h, w in grids])
    return [p.view(t, -1) for p, (t, _, _) in zip(parts, grids, strict=True)]


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_received_attention_is_that_of_the_eager_maps(name, layer):
    """Layer 2 of Qwen2.5-VL looks through windows, layers 1 and 3 at the whole image."""
    inputs = mixed(name, [["i0"], ["i1", "i2"]])
    items = seen(subject(name), inputs, layer=layer)
    for item, want in zip(items, received_by_hand(name, inputs, layer, IMAGES), strict=True):
        assert_near(item.received_attention(layer), want)
    videos = mixed(name, [["v0", "v1"], ["v2"]])
    items = seen(subject(name), videos, layer=layer)
    for item, want in zip(items, received_by_hand(name, videos, layer, VIDEOS), strict=True):
        assert_near(item.received_attention(layer), want)


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_those_of_the_eager_attention(name):
    """Queries times keys give the maps, so a mean key per cell gives the block means of the logits."""
    inputs, layer = mixed(name, [["i0"], ["i1", "i2"]]), 3
    tower, caught = eager(name).base_model.visual, []
    module = __import__(type(tower).__module__, fromlist=["x"])
    original = module.eager_attention_forward

    def spy(asker, query, key, *args, **kwargs):
        if asker is tower.blocks[layer].attn:
            caught.append(key[0].transpose(0, 1).flatten(1))
        return original(asker, query, key, *args, **kwargs)

    module.eager_attention_forward = spy
    try:
        with torch.no_grad():
            eager(name)(**inputs)
    finally:
        module.eager_attention_forward = original
    keys = torch.cat(caught).unflatten(0, (-1, 4)).mean(1)
    if name == "qwen2_5_vl":
        order, _ = get_vision_window_index(torch.tensor(IMAGES), 2, tower.window_size, 7)
        keys = torch.zeros_like(keys).index_copy(0, order, keys)
    items = seen(subject(name), inputs, layer=layer)
    for item, want in zip(items, keys.split([t * h * w // 4 for t, h, w in IMAGES]), strict=True):
        assert_near(item.keys(layer)[0], want)


def test_global_layers():
    towers = {name: vtoken.adapters.registry.adapter_for(clean(name)).towers["image"].info for name in NAMES}
    assert towers["qwen2_5_vl"].global_layers == (1, 3)
    assert all(towers[n].global_layers == (0, 1, 2, 3) for n in NAMES if n != "qwen2_5_vl")
    assert towers["qwen2_5_vl"].layers_up_to_feature(2) == (1, 3)


def test_list_strategies_knows_what_fits():
    fit = vtoken.list_strategies(model=clean("qwen2_5_vl"))
    assert {"random", "uniform", "pool"} <= set(fit) and not {"hired", "vtc_cls"} & set(fit)
    with pytest.raises(ValueError, match='score="received"'):
        vtoken.patch(subject("qwen2_5_vl"), "hired")


# -- odd inputs ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", [(2, 2), (2, 40), (40, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_grids(name, grid):
    """One cell, and one row or column of cells: at least one token stays."""
    height, width = grid
    n = height * width // 4
    ids, mask = left_pad([[*text(3, 1), START, *[IMG] * n, END, *text(4, 2)]])
    values = torch.randn(height * width, 294, generator=torch.Generator().manual_seed(3))
    inputs = dict(
        input_ids=ids, attention_mask=mask, pixel_values=values, image_grid_thw=torch.tensor([[1, *grid]])
    )
    inputs |= token_types(ids, mask)
    with patched(subject(name), create("hired", budget=0.2, score="received")) as spy:
        out = run(subject(name), inputs)
        visual = vtoken.report(subject(name)).visuals[0]
    assert visual.tokens_out == max(1, int(n * 0.2))
    assert_same(out, inputs, expected(name, inputs, spy))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_number_of_placeholders(name):
    inputs = FAMILIES[name].batch("one")
    inputs["input_ids"][inputs["input_ids"] == IMG] = torch.tensor([IMG] * 17 + [9])
    with vtoken.applied(subject(name), "random"), pytest.raises(ValueError, match="tokens"), torch.no_grad():
        subject(name)(
            **{k: v for k, v in inputs.items() if k != "mm_token_type_ids"}, position_ids=_flat(inputs)
        )
    run(subject(name), FAMILIES[name].batch("one"), 1)  # nothing stays behind


def _flat(inputs: dict) -> torch.Tensor:
    return torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)


def test_video_strategies_are_refused_on_images():
    """A method for frames names what fits when the prompt holds an image."""
    video_only = [
        n
        for n in vtoken.list_strategies(model=clean("qwen2_5_vl"))
        if vtoken.strategy_info(n).cls().needs(None).modalities == ("video",)
    ]
    assert video_only
    for strategy in video_only:
        with (
            vtoken.applied(subject("qwen2_5_vl"), strategy),
            pytest.raises(ValueError, match="not defined for image"),
        ):
            run(subject("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].batch("one"), 1)
        check("qwen2_5_vl/video", strategy, FAMILIES["qwen2_5_vl/video"].prompt([[0], [1]]))


def test_frames_of_one_video_lie_between_words():
    """Qwen3-VL's placeholders come in one run per frame: one item for the whole video all the same."""
    inputs = FAMILIES["qwen3_vl/video"].prompt([[0]])
    places = (inputs["input_ids"][0] == VID).nonzero()[:, 0]
    assert int((places.diff() > 1).sum()) == VIDEOS[0][0] - 1
    (item,) = seen(subject("qwen3_vl/video"), inputs, received=False, keys=False)
    assert len(item) == len(places)
