"""Gemma 3n and Gemma 4: the cell of every token, the tower's scores, embeddings that go into the LLM's layers."""

from __future__ import annotations

import pytest
import torch
import transformers

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from tests.models.common import END, IMG, START, left_pad, pixels, text
from tests.models.gemma import AUDIO, IMAGES, VIDEOS
from tests.models.qwen import token_types
from vtoken.strategies import create

from .families import (
    STRATEGIES,
    Probe,
    assert_near,
    block_means,
    check,
    check_attention_rows,
    check_full_budget,
    eager,
    loudest,
    maps_of,
    quiet,
    seen,
)
from .pictures import painted

NAMES = [n for n in ("gemma4", "gemma4_large", "gemma4_unified", "gemma3n") if n in FAMILIES]
GEMMA4 = [n for n in NAMES if n != "gemma3n"]
TOWERS = [n for n in GEMMA4 if n != "gemma4_unified"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [n for n in FAMILIES if n.partition("/")[0] in TOWERS])
def test_strategies(name, strategy):
    check(name, strategy, FAMILIES[name].prompt([[0], [1, 2], []]), **STRATEGIES[strategy])


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.partition("/")[0] in NAMES])
def test_full_budget_is_the_unpatched_model(name):
    check_full_budget(name)


@pytest.mark.parametrize("name", GEMMA4)
def test_segments(name):
    rows = FAMILIES[name].prompt([[0], [1, 2]])
    items = seen(subject(name), rows, received=False, keys=False)
    side = 1 if name == "gemma4_unified" else 2
    assert [[s.grid for s in item.segments] for item in items] == [
        [(h // side, w // side)] for h, w in IMAGES
    ]
    rows = FAMILIES[f"{name}/video"].prompt([[0], [1, 2]])
    items = seen(subject(f"{name}/video"), rows, received=False, keys=False)
    for item, (t, h, w) in zip(items, VIDEOS, strict=True):
        assert [(s.kind, s.grid) for s in item.segments] == [("frame", (h // side, w // side))] * t


def processed(name: str, box: tuple[int, int, int, int] | None) -> dict[str, torch.Tensor]:
    """A picture of 140 x 98 pixels, through the family's own image processor: 70 cells of 14 x 14 pixels."""
    unified = name == "gemma4_unified"
    cls = transformers.Gemma4UnifiedImageProcessor if unified else transformers.Gemma4ImageProcessor
    processor = cls(patch_size=7, pooling_kernel_size=2, max_soft_tokens=70)
    out = processor([painted((140, 98), box)], return_tensors="pt")
    (n,) = out["num_soft_tokens_per_image"]
    ids, mask = left_pad([[*text(3, 1), START, *[IMG] * int(n), END, *text(4, 2)]])
    given = {k: out[k] for k in ("pixel_values", "image_position_ids")}
    return dict(input_ids=ids, attention_mask=mask, **given, **token_types(ids, mask))


@pytest.mark.parametrize("cell", [(0, 0), (0, 8), (3, 2), (6, 0), (6, 9)])
@pytest.mark.parametrize("name", GEMMA4)
def test_a_marked_patch_is_found_at_its_cell(name, cell):
    (row, column), rows, columns = cell, 7, 10
    box = (column * 14, row * 14, column * 14 + 7, row * 14 + 14)  # half of the cell: no plain patch
    model, prompts = quiet(name), [processed(name, b) for b in (None, box)]
    (before,), (after,) = (seen(model, p, received=False, keys=False) for p in prompts)
    assert after.segments[0].grid == (rows, columns)
    assert divmod(loudest(before, after), columns) == cell
    mark = row * columns + column
    with vtoken.applied(model, Probe(budget=0.5, received=False, keys=False, mark=(mark,))):
        run(model, prompts[1], 1)
        visual = vtoken.report(model).visuals[0]
    assert visual.cells[visual.keep].tolist() == [mark] and visual.tokens_out == 1


@pytest.mark.parametrize("cell", [(0, 0), (0, 3), (3, 0), (2, 1)])
@pytest.mark.skipif("gemma3n" not in FAMILIES, reason="timm or the model is missing")
def test_a_marked_square_of_gemma3n_is_found_at_its_cell(cell):
    plain = FAMILIES["gemma3n"].prompt([[0]])
    values = torch.full_like(plain["pixel_values"], 0.1)
    marked = values.clone()
    marked[..., cell[0] * 32 + 8 : cell[0] * 32 + 24, cell[1] * 32 + 8 : cell[1] * 32 + 24] = 3
    prompts = [plain | dict(pixel_values=v) for v in (values, marked)]
    (before,), (after,) = (seen(subject("gemma3n"), p, received=False, keys=False) for p in prompts)
    assert divmod(loudest(before, after), 4) == cell


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("name", TOWERS)
def test_received_attention_is_that_of_the_eager_maps(name, layer):
    inputs = FAMILIES[name].prompt([[0], [1, 2]])
    items = seen(subject(name), inputs, layer=layer)
    (maps,) = maps_of(name, inputs, eager(name).base_model.vision_tower.encoder.layers[layer].self_attn)
    for item, one, (h, w) in zip(items, maps, IMAGES, strict=True):
        real = one[:, : h * w].mean((0, 1))[: h * w]  # padding attends to nothing that is read
        assert_near(item.received_attention(layer)[0], block_means(real, h, w, 2))


@pytest.mark.parametrize("name", [n for n in GEMMA4 if n != "gemma4"])
def test_attention_rows_are_those_of_the_eager_model(name):
    check_attention_rows(name)


@pytest.mark.parametrize("name", [n for n in ("gemma3n", "gemma4") if n in NAMES])
def test_layers_that_share_keys_are_refused_inside(name):
    with pytest.raises(ValueError, match=r"cannot be done to layers of type|has no such projections"):
        vtoken.patch(subject(name), "fastv")


@pytest.mark.parametrize("name", [n for n in ("gemma3n", "gemma4", "gemma4_large") if n in NAMES])
def test_embeddings_of_the_layers_follow_their_tokens(name):
    """The LLM reads embeddings for its layers too: those of the kept tokens, and no fewer for text."""
    family, model = FAMILIES[name], subject(name)
    inputs, got = family.prompt([[0], [1, 2]]), []
    with patched(model, create("uniform", budget=0.3)), torch.no_grad():
        hook = model.get_decoder().register_forward_pre_hook(
            lambda m, a, kw: got.append((kw["inputs_embeds"].shape, kw["per_layer_inputs"].shape)),
            with_kwargs=True,
        )
        model(**inputs)
        hook.remove()
    (embeds, per_layer), *_ = got
    assert embeds[:2] == per_layer[:2] and embeds[1] < inputs["input_ids"].shape[1]


@pytest.mark.skipif("gemma4" not in FAMILIES, reason="not in this transformers")
def test_the_answer_for_the_last_tokens_alone():
    """Layers that share keys compute the last tokens only where the caller asks for no others."""
    name = "gemma4"
    model, inputs = subject(name), FAMILIES[name].prompt([[0], [1, 2]])
    with patched(model), torch.no_grad():
        whole = model(**inputs).logits
        for count in (1, 2, 3, 100):
            last = model(**inputs, logits_to_keep=count).logits
            assert_near(last, whole[:, -count:], 1e-4)


@pytest.mark.skipif("gemma3n" not in FAMILIES, reason="timm or the model is missing")
def test_audio_of_gemma3n_stays():
    item, model = FAMILIES["gemma3n"].item(0, 1), subject("gemma3n")
    ids, mask = left_pad(
        [[*text(3, 1), *item.ids, *[AUDIO] * 4, *text(3, 2)], [*text(2, 3), *[AUDIO] * 4, 9]]
    )
    heard = dict(
        input_features=pixels(2, 32, 32, seed=9), input_features_mask=torch.ones(2, 32, dtype=torch.bool)
    )
    inputs = dict(input_ids=ids, attention_mask=mask, **item.tensors, **heard)
    with patched(model, create("uniform", budget=0.3)) as spy:
        out = run(model, inputs, 3)
    assert_same(out, inputs, expected("gemma3n", inputs, spy, 3))
    dense = run(clean("gemma3n"), inputs, 1).logits[0]
    changed = (out.logits[0] - dense).abs().amax(1)
    assert changed[0] > 1e-2 and changed[1] < 1e-4
