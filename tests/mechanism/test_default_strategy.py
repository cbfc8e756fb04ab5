"""`vtoken.patch(model)` without the name of a strategy."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.models import FAMILIES
from vtoken.patching import patch_of

from .common import consistent


def test_it_is_farcover_with_the_options_given():
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("one")
    vtoken.patch(model, budget=0.3, depth=0.5)
    strategy = patch_of(model).strategy
    assert (strategy.info.name, strategy.budget, strategy.relevance, strategy.depth) == (
        "farcover",
        0.3,
        0.25,
        0.5,
    )
    with torch.no_grad():
        pruned = model(**inputs).logits
        vtoken.unpatch(model)
        with vtoken.applied(model, "farcover", budget=0.3, depth=0.5):
            assert torch.equal(model(**inputs).logits, pruned)
        with vtoken.applied(model, budget=0.3, depth=0.5):
            assert torch.equal(model(**inputs).logits, pruned)


def test_where_the_layers_cannot_look_the_question_is_not_read():
    model = FAMILIES["llava"].build()
    del model.get_decoder().layers[0].input_layernorm
    vtoken.patch(model, budget=0.3)
    assert patch_of(model).strategy.relevance == 0.0
    vtoken.unpatch(model)
    with pytest.raises(ValueError, match="input_layernorm"):
        vtoken.patch(model, budget=0.3, relevance=0.5)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_autocast_around_the_patch_does_not_look_like_another_attention(name):
    model = FAMILIES[name].build()
    with torch.autocast("cpu", torch.bfloat16), vtoken.applied(model, budget=0.3):
        assert patch_of(model).strategy.relevance == 0.25
    with torch.autocast("cpu", torch.bfloat16), vtoken.applied(model, "fastv", layer=1):
        pass


def test_where_the_question_cannot_be_read_the_sentence_tells_how_not_to():
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("one")
    vtoken.patch(model, budget=0.3)
    with pytest.raises(ValueError, match=r"labels .* to -100, or use .* farcover with relevance=0\.0"):
        model(**inputs, labels=inputs["input_ids"])
    with vtoken.applied(model, budget=0.3, relevance=0.0):
        assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()
    if consistent("llava", inputs, prefill_chunk_size=4):
        with pytest.raises(NotImplementedError, match=r"chunked prefill .* farcover with relevance=0\.0"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=4)


def test_a_plain_encoder_has_no_default():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32
    )
    with pytest.raises(ValueError, match=r"no default strategy: name one of .*tome"):
        vtoken.patch(CLIPVisionModel(config))


@pytest.mark.parametrize("budget", [0.2, 64, torch.tensor(0.25)])
def test_a_budget_in_the_place_of_the_name_is_told_where_it_goes(budget):
    with pytest.raises(TypeError, match=f"A strategy is a name .*found .*: write budget={float(budget):g}"):
        vtoken.patch(FAMILIES["llava"].build(), budget)
