"""InternVL, SmolVLM and Idefics3, Gemma3, Mistral3, PaliGemma: strategy inputs and generated answers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from torch import Tensor

import vtoken
from tests import oracle
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from tests.models.common import END, IMG, LM, START, VIT, left_pad, pixels, text
from tests.models.siglip import GRIDS, TILES
from vtoken.strategies import create

from .families import (
    STRATEGIES,
    Probe,
    assert_near,
    attention,
    block_means,
    check,
    check_full_budget,
    eager,
    loudest,
    maps_of,
    quiet,
    seen,
    tiled_inputs,
)

NAMES = ("internvl", "smolvlm", "idefics3", "gemma3", "mistral3", "paligemma")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_strategies(name, strategy):
    """Left-padded rows with one and two images of different sizes, and a row of text."""
    inputs = FAMILIES[name].prompt([[0], [1, 2], []])
    check(name, strategy, inputs, **STRATEGIES[strategy])


@pytest.mark.parametrize("strategy", ["hired", "vtc_cls"])
def test_class_token_of_internvl(strategy):
    check("internvl", strategy, FAMILIES["internvl"].prompt([[0], [1, 2], []]))


@pytest.mark.parametrize("name", NAMES)
def test_full_budget_is_the_unpatched_model(name):
    check_full_budget(name)


@pytest.mark.parametrize("name", NAMES)
def test_list_strategies_knows_what_fits(name):
    fit = set(vtoken.list_strategies(model=clean(name)))
    assert {"random", "uniform", "pool"} <= fit
    assert ({"hired", "vtc_cls"} <= fit) == (name == "internvl")
    if name != "internvl":
        with pytest.raises(ValueError, match='score="received"'):
            vtoken.patch(subject(name), "vtc_cls")


# -- one image, many tiles -----------------------------------------------------------------------------------
def test_tiles_of_one_run_are_one_image():
    items = seen(subject("internvl"), FAMILIES["internvl"].prompt([[0, 1], [2]]), received=False, keys=False)
    assert [len(item.segments) for item in items] == TILES
    for item in items:
        assert item.cells.tolist() == list(range(len(item))) and {s.grid for s in item.segments} == {(4, 4)}


def test_frames_of_a_video_are_images_to_internvl():
    """The processor writes one image per frame with words between them."""
    frames = [[*text(2, 60 + f), START, *[IMG] * 16, END] for f in range(3)]
    ids, mask = left_pad([[*text(3, 1), *[t for f in frames for t in f], *text(4, 2)]])
    inputs = dict(input_ids=ids, attention_mask=mask, pixel_values=pixels(3, 3, 56, 56, seed=4))
    check("internvl", "hired", inputs)
    assert [len(i.segments) for i in seen(subject("internvl"), inputs, received=False, keys=False)] == [
        1,
        1,
        1,
    ]


# -- geometry ------------------------------------------------------------------------------------------------
def pictures(name: str, cell: tuple[int, int] | None) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """A prompt of one grey picture, a white square over one cell if `cell` is given; the grid."""
    grid = GRIDS[0] if name == "mistral3" else (4, 4)
    side = 7 if name == "paligemma" else 14
    inputs = FAMILIES[name].prompt([[0]])
    values = torch.full_like(inputs["pixel_values"], -0.3)
    if cell is not None:
        y, x = cell[0] * side, cell[1] * side
        values[..., y : y + side, x : x + side] = 3
    return inputs | dict(pixel_values=values), grid


@pytest.mark.parametrize("cell", [(0, 0), (0, 3), (3, 0), (2, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_a_marked_patch_is_found_at_its_cell(name, cell):
    cell = (cell[0], 5) if name == "mistral3" and cell[1] == 3 else cell  # 4 x 6 cells
    (plain, grid), (marked, _) = pictures(name, None), pictures(name, cell)
    model = quiet(name)
    (before,), (after,) = (seen(model, p, received=False, keys=False) for p in (plain, marked))
    assert after.segments[0].grid == grid
    found = loudest(before, after)
    assert divmod(found, grid[1]) == cell
    with vtoken.applied(model, Probe(budget=0.5, received=False, keys=False, mark=(found,))):
        run(model, marked, 1)
        visual = vtoken.report(model).visuals[0]
    assert visual.cells[visual.keep].tolist() == [cell[0] * grid[1] + cell[1]]


def test_sizes_of_mistral3():
    items = seen(subject("mistral3"), FAMILIES["mistral3"].prompt([[0], [1, 2]]), received=False, keys=False)
    assert [item.segments[0].grid for item in items] == GRIDS


# -- scores --------------------------------------------------------------------------------------------------
def single_tiles(name: str) -> dict[str, Tensor]:
    """Three images or more, so that tiles, cells and scores are in the tower's order."""
    if name in ("smolvlm", "idefics3"):
        return tiled_inputs([[(0, 0)], [(0, 0), (0, 0)]])
    return FAMILIES[name].prompt([[0], [1, 2]])


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_received_attention_is_that_of_the_eager_maps(name, layer):
    inputs = single_tiles(name)
    items = seen(subject(name), inputs, layer=layer, cls=name == "internvl")
    (maps,) = maps_of(name, inputs, attention(name, layer))
    got = torch.cat([item.received_attention(layer).flatten() for item in items])
    if name == "mistral3":
        want, start = [], 0
        for h, w in GRIDS:
            n = 4 * h * w
            block = maps[0, :, start : start + n, start : start + n]
            assert_near(block.sum(-1), torch.ones(block.shape[:2]))  # images do not see each other
            want.append(block_means(block.mean((0, 1)), 2 * h, 2 * w, 2))
            start += n
        assert_near(got, torch.cat(want))
        return
    if name == "internvl":
        rows = torch.cat([item.cls_attention(layer) for item in items])
        assert_near(
            rows, torch.stack([torch.stack([block_means(h[0, 1:], 8, 8, 2) for h in m]) for m in maps])
        )
        maps = maps[..., 1:]
    side = 1 if name == "paligemma" else 2
    n = 4 if name == "paligemma" else 8
    assert_near(got, torch.cat([block_means(m.mean((0, 1)), n, n, side) for m in maps]))


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_those_of_the_eager_attention(name):
    inputs, layer, caught = single_tiles(name), 3, []
    module = attention(name, layer)
    home = __import__(type(module).__module__, fromlist=["x"])
    original = home.eager_attention_forward

    def spy(asker, query, key, *args, **kwargs):
        if asker is module:
            caught.append(key.transpose(1, 2).flatten(2))
        return original(asker, query, key, *args, **kwargs)

    home.eager_attention_forward = spy
    try:
        with torch.no_grad():
            eager(name)(**{k: v.clone() for k, v in inputs.items()})
    finally:
        home.eager_attention_forward = original
    items = seen(subject(name), inputs, layer=layer)
    got = torch.cat([item.keys(layer).flatten(0, 1) for item in items])
    if name == "mistral3":
        parts = caught[0][0].split([4 * h * w for h, w in GRIDS])
        assert_near(
            got, torch.cat([block_means(p, 2 * h, 2 * w, 2) for p, (h, w) in zip(parts, GRIDS, strict=True)])
        )
        return
    first, n, side = int(name == "internvl"), 4 if name == "paligemma" else 8, 1 if name == "paligemma" else 2
    assert_near(got, torch.cat([block_means(k[first:], n, n, side) for k in caught[0]]))


# -- odd inputs ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_wrong_number_of_placeholders(name):
    inputs = FAMILIES[name].batch("one")
    places = (inputs["input_ids"][0] == IMG).nonzero()[:, 0]
    inputs["input_ids"][0, places[-1]] = 9
    with vtoken.applied(subject(name), "random"), pytest.raises((ValueError, RuntimeError), match="tokens"):
        run(subject(name), inputs, 1)
    run(subject(name), FAMILIES[name].batch("one"), 1)  # nothing stays behind


def test_smallest_images_of_mistral3():
    """One row, or one column, of cells (a single cell is more than the unpatched model can split)."""
    for h, w in ((1, 2), (1, 6), (6, 1)):
        ids, mask = left_pad([[*text(3, 1), *[IMG] * (h * w), END, *text(4, 2)]])
        inputs = dict(input_ids=ids, attention_mask=mask, pixel_values=pixels(1, 3, 14 * h, 14 * w))
        inputs["image_sizes"] = torch.tensor([[14 * h, 14 * w]])
        with patched(subject("mistral3"), create("hired", budget=0.2, score="received")) as spy:
            out = run(subject("mistral3"), inputs)
        assert_same(out, inputs, expected("mistral3", inputs, spy))
        assert len(spy.items[0][1].keep) == max(1, int(0.2 * h * w))


def test_pixtral_tower_of_llava():
    """Pixtral-12B is a LLaVA whose images have any size; a patch is a cell."""
    vision = transformers.PixtralVisionConfig(**VIT, image_size=84, patch_size=14, head_dim=8)
    text_config = transformers.MistralConfig(**LM, sliding_window=None)
    features = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")

    def config():
        return transformers.LlavaConfig(
            vision_config=vision, text_config=text_config, image_token_id=IMG, **features
        )

    family = dataclasses.replace(
        FAMILIES["mistral3"], name="pixtral", architecture="LlavaForConditionalGeneration", config=config
    )
    inputs, model = family.prompt([[0], [1, 2], []]), family.build()
    with patched(model, create("hired", budget=0.3, score="received")) as spy:
        out = run(model, inputs)
        assert [v.segments[0].grid for v in vtoken.report(model).visuals] == GRIDS
    keep, _ = spy.in_front(family, inputs)
    assert_same(out, inputs, oracle.generate(model, inputs, keep))


def test_prompts_of_embeddings():
    """Idefics3 finds its placeholders by id only: a clear sentence; the others are served."""
    for name in ("internvl", "idefics3", "mistral3"):
        inputs = FAMILIES[name].batch("one")
        embeds = clean(name).get_input_embeddings()(inputs["input_ids"]).detach()
        given = {k: v for k, v in inputs.items() if k != "input_ids"} | dict(inputs_embeds=embeds)
        with patched(subject(name), create("uniform", budget=0.3)) as spy, torch.no_grad():
            if name == "idefics3":
                with pytest.raises(NotImplementedError, match="input_ids"):
                    subject(name)(**given)
                continue
            logits = subject(name)(**given).logits[:, -1]
            keep, _ = spy.in_front(FAMILIES[name], inputs)
        want = oracle.generate(clean(name), inputs, keep, 1)[1][0]
        assert (logits - want).abs().max() < 1e-3
