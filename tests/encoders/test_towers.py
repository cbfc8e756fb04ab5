"""ToMe inside the towers of vision-language models: features of an explicit tower, one token per group."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_close, clean, run, subject
from tests.models import FAMILIES

from . import oracle
from .models import hf_block


def tower_of(model):
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def explicit(model, pixels, plan, prefix):
    """Per image the tokens of the feature layer, and the owner of every patch."""
    tower = tower_of(model)
    layers = list(tower.encoder.layers)[: len(plan)]
    seen = []
    handle = layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    with torch.no_grad():
        tower(pixels)
        handle.remove()
        results = [oracle.tome([hf_block(m) for m in layers], x, plan, prefix) for x in seen[0]]
    return [(r.x, r.source.argmax(0)[prefix:]) for r in results]


# LLaVA reads the layer before the last of four, PaliGemma the last, after a norm
@pytest.mark.parametrize("family, plan, prefix", [("llava", [2, 3, 3], 1), ("paligemma", [2, 2, 2, 2], 0)])
def test_features_are_those_of_an_explicit_tower(family, plan, prefix):
    pixels = FAMILIES[family].batch("ragged")["pixel_values"]
    merged = explicit(clean(family), pixels, plan, prefix)
    model = subject(family)
    with torch.no_grad(), vtoken.applied(model, "tome", budget=0.5):
        got = model.model.get_image_features(pixels).pooler_output
    for features, (x, owner) in zip(got, merged, strict=True):
        x = x if family == "llava" else tower_of(model).post_layernorm.double()(x)
        tower_of(model).float()
        want = model.model.multi_modal_projector.double()(x[owner][None])[0]
        model.model.multi_modal_projector.float()
        assert_close(features.double(), want.detach())
        assert len(set(owner.tolist())) == 8


@pytest.mark.parametrize("family", ["llava", "paligemma", "llava_next"])
@pytest.mark.parametrize("budget", [0.25, 0.5, 4])
def test_the_budget_counts_what_enters_the_llm(family, budget):
    inputs, model = FAMILIES[family].batch("ragged"), subject(family)
    with vtoken.applied(model, "tome", budget=budget):
        run(model, inputs, 1)
        for visual in vtoken.report(model).visuals:
            allowed = vtoken.strategies.ToMe(budget=budget).counts(visual.segments)
            assert 0 < visual.tokens_out <= sum(allowed)
            if len(visual.segments) == 1:
                assert visual.tokens_out == sum(allowed)


def test_with_a_strategy_inside_the_llm_under_one_budget():
    inputs, model = FAMILIES["llava"].batch("one"), subject("llava")
    with vtoken.applied(model, ["tome", "fastv"], 0.25):
        run(model, inputs, 1)
        report = vtoken.report(model)
    assert report.tokens_out == 8 and report.visual_per_layer[-1] == 4


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "gemma3"])
def test_towers_whose_patches_are_pooled_are_refused(family):
    name = next(n for n in FAMILIES if n.startswith(family))
    with pytest.raises(ValueError, match=r"tome needs patches .* does not have: use "):
        vtoken.patch(subject(name), "tome", budget=0.5)


@pytest.mark.parametrize("name", ["tempme", "diffrate"])
def test_methods_for_plain_encoders_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} is defined for plain encoders.*use "):
        vtoken.patch(subject("llava"), name)


def test_a_plan_that_cannot_reach_the_budget_is_refused():
    with (
        pytest.raises(ValueError, match="cannot go from 16 patch tokens to 1 in 3 layers"),
        vtoken.applied(subject("llava"), "tome", budget=0.07),
    ):
        run(subject("llava"), FAMILIES["llava"].batch("one"), 1)
