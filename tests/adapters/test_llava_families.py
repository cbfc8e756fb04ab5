"""LLaVA-NeXT(-Video), LLaVA-OneVision, Video-LLaVA and ViP-LLaVA: generated answers, and refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vtoken
from tests import oracle
from tests.mechanism.common import assert_close, assert_moved, assert_same, clean, expected, run, subject
from tests.mechanism.fixed import Spy, matrix, patched
from tests.mechanism.test_turns import first_turn
from tests.models import FAMILIES
from tests.models.common import IMG, VID, left_pad, text
from vtoken.mechanism.forward_context import ENCODED
from vtoken.strategies import create

from .anyres import SIDE, encode, model_of, picture, prompts
from .families import check_full_budget

NAMES = [
    "vipllava",
    "llava_next",
    "llava_next_video",
    "llava_next_video/video",
    "llava_onevision",
    "llava_onevision/video",
    "video_llava",
    "video_llava/video",
]
BOTH = ["llava_next_video", "llava_onevision", "video_llava"]
VISION = ("pixel_values", "image_sizes")
STRATEGIES = ["random", "uniform", "hired", "vtc_cls", "pool"]


def strategy(name: str, family: str, budget: float | int = 0.3):
    """The strategy, with attention received as its score where the tower has no CLS token."""
    received = name in ("hired", "vtc_cls") and family.startswith("llava_onevision")
    return create(name, budget=budget, **(dict(score="received") if received else {}))


@pytest.mark.parametrize(
    "method, kind", [*((m, "ragged") for m in STRATEGIES), ("hired", "one"), ("pool", "text_only_row")]
)
@pytest.mark.parametrize("name", NAMES)
def test_generates_what_the_oracle_generates(name, method, kind):
    model, inputs = subject(name), FAMILIES[name].batch(kind)
    with patched(model, strategy(method, name)) as spy:
        out = run(model, inputs)
        report = vtoken.report(model)
    assert_same(out, inputs, expected(name, inputs, spy))
    assert_moved(out, name, inputs)
    assert report.tokens_in == int(FAMILIES[name].visual(inputs).sum())
    assert report.tokens_out == sum(len(answer.keep) for _, answer in spy.items)
    assert all(0 < v.tokens_out < v.tokens_in for v in report.visuals)


@pytest.mark.parametrize("method", ["hired", "pool"])
@pytest.mark.parametrize("name", NAMES)
def test_several_images_and_two_turns(name, method):
    model, inputs = subject(name), FAMILIES[name].batch("several_images")
    with patched(model, strategy(method, name)) as spy:
        whole, again = first_turn(model, inputs)
        out = run(model, again)
    assert len(spy.items) == min(3, FAMILIES[name].per_prompt)
    assert_same(out, whole, expected(name, whole, spy))


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_one_is_the_unpatched_model(name):
    check_full_budget(name)


@pytest.mark.parametrize("method", ["hired", "pool"])
@pytest.mark.parametrize("name", BOTH)
def test_image_and_video_in_one_prompt(name, method):
    """Two prompts, one with the image first, the other with the video first."""
    image, video = FAMILIES[name], FAMILIES[f"{name}/video"]
    model, unpatched = subject(name), clean(name)
    pictures, films = [image.item(i, 1) for i in (0, 1)], [video.item(i, 1) for i in (0, 1)]
    rows = [text(2, 1) + pictures[0].ids + text(3, 2) + films[0].ids + text(2, 3)]
    rows += [text(4, 4) + films[1].ids + text(1, 5) + pictures[1].ids + text(3, 6)]
    ids, mask = left_pad(rows)
    tensors = image.collate([[p] for p in pictures]) | video.collate([[f] for f in films])
    inputs = dict(input_ids=ids, attention_mask=mask, **tensors)
    with patched(model, strategy(method, name)) as spy:
        out = run(model, inputs)
        report = vtoken.report(model)
    assert [v.modality for v in report.visuals] == ["image", "image", "video", "video"]
    keep, merge = combined(spy, inputs)
    assert_same(out, inputs, oracle.generate(unpatched, inputs, keep, merge=merge))
    assert_moved(out, name, inputs)


def combined(spy: Spy, inputs: dict) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """`keep` and `merge` of prompts with images and videos: the strategy was asked about all images first."""
    items = iter(spy.items)
    keep = torch.ones_like(inputs["attention_mask"]).bool()
    parts: list[dict[int, tuple]] = [{} for _ in keep]
    for token in (IMG, VID):
        for b, row in enumerate(inputs["input_ids"]):
            places = (row == token).nonzero()[:, 0]
            n, answer = next(items)
            assert n == len(places)
            keep[b, places] = False
            keep[b, places[answer.keep]] = True
            parts[b][int(places[0])] = (matrix(answer, n), answer.into is not None)
    assert next(items, None) is None
    merge = [
        torch.block_diag(*(m for _, (m, _) in sorted(p.items())))
        if any(merges for _, merges in p.values())
        else None
        for p in parts
    ]
    return keep, merge


# -- the tower's attention lines up with the tokens ----------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["llava_next_video/video", "llava_onevision/video", "video_llava/video", "vipllava"]
)
def test_scores_are_on_the_grid_of_the_tokens(name):
    """They are the tower's own attention maps, pooled as the model pools its frames."""
    model, family = FAMILIES[name].build(), FAMILIES[name]
    modality, cls = family.modality, not name.startswith("llava_onevision")
    inputs = family.batch("one")
    seen = {}
    made = strategy("vtc_cls", name)
    select = made.select
    made.select = lambda tokens: (seen.update(tokens=tokens), select(tokens))[1]
    with vtoken.applied(model, made), torch.no_grad():
        model(**inputs)
    tokens, base = seen["tokens"], model.base_model
    tower = getattr(base, "vision_tower", None) or getattr(base, f"{modality}_tower")
    pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values")).flatten(0, -4)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(pixels, output_attentions=True).attentions
    layer = tokens.tower.feature_layer
    assert layer == (2 if cls else 3)
    want = maps[layer][:, :, 0, 1:] if cls else maps[layer].mean((1, 2))
    if name.startswith("llava_"):
        square = want.reshape(-1, 1, SIDE, SIDE)
        want = torch.nn.functional.avg_pool2d(square, 2).view(*want.shape[:-1], SIDE**2 // 4)
    got = tokens.cls_attention(layer) if cls else tokens.received_attention(layer)
    assert got.shape[0] == len(tokens.segments) and got.shape[-1] == tokens.segments[0].size
    assert_close(got, want)


def test_pooling_of_odd_grids():
    """7 x 7 patches: LLaVA-NeXT-Video leaves the last line out, LLaVA-OneVision resamples to 4 x 4."""
    scores = torch.rand(2, 3, 49)
    for name, want, box in [
        (
            "llava_next_video",
            torch.nn.functional.avg_pool2d(scores.view(2, 3, 7, 7), 2),
            (0, 0, 6 / 7, 6 / 7),
        ),
        (
            "llava_onevision",
            torch.nn.functional.interpolate(scores.view(2, 3, 7, 7), (4, 4), mode="bilinear"),
            (0, 0, 1, 1),
        ),
    ]:
        model = model_of(name, 0, None, 7)
        with vtoken.applied(model, "uniform", budget=0.5), torch.no_grad():
            adapter = model.__dict__["_vtoken_patch"].adapter
            assert_close(adapter.towers["video"].to_cells(scores), want.flatten(2))
            assert adapter.towers["image"].to_cells(scores) is scores
            out = model.get_video_features(torch.zeros(1, 3, 3, 28, 28))
        (item,) = getattr(out, ENCODED).items
        assert {s.grid for s in item.segments} == {tuple(want.shape[2:])}
        assert item.segments[0].box == pytest.approx(box)


def test_cls_rows_of_a_video_are_no_patches():
    model = subject("video_llava")
    inputs = FAMILIES["video_llava/video"].batch("one")
    with vtoken.applied(model, "random", budget=0.5), torch.no_grad():
        model(**inputs)
        visual = vtoken.report(model).visuals[0]
    assert (visual.cells < 0).nonzero()[:, 0].tolist() == [0, 17, 34]
    assert visual.cells[visual.cells >= 0].tolist() == list(range(48))
    assert int((visual.cells[visual.keep] < 0).sum()) == 0


@pytest.mark.parametrize("name", ["llava", "video_llava"])
def test_a_cls_row_among_image_features(name):
    """vision_feature_select_strategy="full": the CLS row comes first and is no patch."""
    family = FAMILIES[name]

    def config():
        made = family.config()
        made.vision_feature_select_strategy = "full"
        return made

    model = dataclasses.replace(family, config=config).build()
    item = family.item(0, 1)
    ids = torch.tensor([text(2, 1) + [IMG] * 17 + text(3, 2)])
    with vtoken.applied(model, "hired", budget=0.25), torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **item.tensors)
        visual = vtoken.report(model).visuals[0]
    assert visual.cells.tolist() == list(range(-1, 16))
    assert visual.tokens_out == 4 == len(visual.kept_cells)


def test_vip_llava_reads_the_last_of_its_layers():
    """Features of hidden states -2 and -3 of 4 layers: the last layer that makes them is 2."""
    model = subject("vipllava")
    with vtoken.applied(model, "hired") as patched_model:
        tower = patched_model.__dict__["_vtoken_patch"].adapter.towers["image"]
        assert tower.info.feature_layer == 2 and tower.has_cls


# -- what is refused, and odd input --------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["hired", "vtc_cls"])
def test_no_cls_token(method):
    model = subject("llava_onevision")
    with pytest.raises(ValueError, match=r'CLS token.*score="received".*use .*random'):
        vtoken.patch(model, method)
    assert method not in vtoken.list_strategies(model=model)
    assert method in vtoken.list_strategies(model=subject("llava_next"))


@pytest.mark.parametrize("method", STRATEGIES)
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_extreme_sizes(name, method):
    """1 x 1 px, and stripes of which the model unpads the whole canvas: the thumbnail is left."""
    model, unpatched = model_of(name), model_of(name, 2)  # copy 1 is blinded elsewhere
    for size in [(1, 1), (1, 4000), (4000, 1)]:
        inputs = prompts(name, model, [[picture(*size)]])
        with patched(model, strategy(method, name)) as spy:
            out = run(model, inputs, 2)
            (visual,) = vtoken.report(model).visuals
        want = expected(name, inputs, spy, 2, model=unpatched)
        assert_same(out, inputs, want)
        assert 0 < visual.tokens_out < visual.tokens_in
        assert visual.segments[0].kind == "thumbnail" and visual.segments[0].fed == SIDE**2
        if size != (1, 1):
            assert int((visual.cells >= 0).sum()) == SIDE**2 and all(s.fed == 0 for s in visual.segments[1:])


@pytest.mark.parametrize("name", NAMES)
def test_zero_images(name):
    """Text alone, to a patched model, is text alone."""
    model, ids = subject(name), torch.tensor([text(7, 3)])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    plain = run(clean(name), inputs)
    with patched(model, strategy("uniform", name)) as spy:
        out = run(model, inputs)
    assert not spy.items
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_number_of_placeholders(name):
    """A processor that does not belong to the model: one sentence, through both doors, and no state stays
    behind.
    """
    model, family = subject(name), FAMILIES[name]
    inputs = family.batch("one")
    token = VID if family.modality == "video" else IMG
    at = int((inputs["input_ids"][0] == token).nonzero()[-1])
    wrong = dict(inputs)
    wrong["input_ids"] = torch.cat([inputs["input_ids"][:, :at], inputs["input_ids"][:, at + 1 :]], 1)
    wrong["attention_mask"] = inputs["attention_mask"][:, 1:]
    with patched(model, strategy("uniform", name)) as spy:
        for call in (lambda: run(model, wrong), lambda: model(**wrong)):
            with pytest.raises(ValueError, match=r"do not match|processor"):
                call()
        spy.clear()
        out = run(model, inputs)
    assert_same(out, inputs, expected(name, inputs, spy))


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video/video", "video_llava/video"])
def test_placeholders_in_the_wrong_prompt(name):
    """One too many in one prompt, one too few in the other: the unpatched model mixes them silently, vtoken
    does not.
    """
    model, family = subject(name), FAMILIES[name]
    inputs = family.prompt([[0], [1]])
    token = VID if family.modality == "video" else IMG
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == token).nonzero()[-1]] = 11
    ids[1, (ids[1] == token).nonzero()[-1] + 1] = token
    with patched(model, strategy("uniform", name)), pytest.raises(ValueError, match="own processor"):
        run(model, dict(inputs, input_ids=ids))


def test_remembered_sizes_do_not_grow_without_end():
    model = model_of("llava_next")
    with vtoken.applied(model, "uniform"), torch.no_grad():
        known = model.__dict__["_vtoken_patch"].adapter._known
        for i in range(300):
            known[i] = None
        encode_again = prompts("llava_next", model, [[picture(30, 40)]])
        assert 0 < len(known) < 10
        model(**encode_again)
    assert encode(model, {k: encode_again[k] for k in VISION})[0].segments[0].kind == "thumbnail"


def test_sizes_first_met_in_inference_mode_serve_training():
    """Layouts are remembered: an inference tensor among them could not be saved for a backward pass."""
    model = model_of("llava_next")
    vision = {k: v for k, v in prompts("llava_next", model, [[picture(41, 23)]]).items() if k in VISION}
    with torch.inference_mode():
        (item,) = encode(model, vision)
    assert item.features.is_inference() and not item.cells.is_inference()
