"""Whole models: the language model reads as many tokens as the strategy counts."""

from __future__ import annotations

import warnings

import pytest
import torch

import vtoken
from tests.models import FAMILIES, SPECIAL
from vtoken.strategies import create, list_names, strategy_info

PROJECTOR = [n for n in list_names() if strategy_info(n).stages == ("projector",)]


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"].build()


def generate(model, inputs):
    return model.generate(**inputs, max_new_tokens=2, do_sample=False, suppress_tokens=SPECIAL)


@pytest.mark.parametrize("name", PROJECTOR)
def test_the_report_tells_what_was_counted(llava, name):
    strategy = create(name, budget=0.4)
    if name not in vtoken.list_strategies(model=llava):
        with pytest.raises(ValueError, match=name):
            vtoken.patch(llava, strategy)
        return
    inputs = FAMILIES["llava"].batch("ragged")
    with vtoken.applied(llava, strategy):
        generate(llava, inputs)
        report = vtoken.report(llava)
    together = strategy.needs(None).together
    assert len(report.visuals) == (2 if together else 3)  # one prompt has two images
    if not together:
        assert report.tokens_in == 48
    for visual in report.visuals:
        assert visual.tokens_out == len(visual.keep)
        if strategy.static_counts:
            assert visual.tokens_out == sum(strategy.counts(visual.segments)), name
        else:
            assert 1 <= visual.tokens_out <= 16
    text = int(inputs["attention_mask"].sum()) - 48
    if not strategy.prefill_layers(4):
        assert report.tokens_per_layer == [text + report.tokens_out] * 4


def test_logits_read_from_the_tower_are_those_before_its_softmax(llava):
    """The CLS row of the last layer, which runs after the one that makes the features."""
    seen = {}

    def spy(tokens):
        seen[len(seen)] = tokens.cls_logits(3)
        return original(tokens)

    strategy = create("globalcom2", budget=0.5)
    original, strategy.select = strategy.select, spy
    inputs = FAMILIES["llava"].batch("one")
    with vtoken.applied(llava, strategy):
        generate(llava, inputs)
    attention = (
        llava.model.vision_tower.vision_model if hasattr(llava.model.vision_tower, "vision_model") else None
    )
    layer = (attention or llava.model.vision_tower).encoder.layers[3]
    captured = {}
    handle = layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(x=(args or [kwargs["hidden_states"]])[0]),
        with_kwargs=True,
    )
    llava.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    handle.remove()
    heads = layer.self_attn.num_heads
    q, k = (f(captured["x"]).view(17, heads, -1) for f in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    want = torch.einsum("hd,nhd->hn", q[0], k[1:]).mean(0) / q.shape[-1] ** 0.5
    torch.testing.assert_close(seen[0][0], want, rtol=1e-4, atol=1e-5)


def test_whole_numbers_above_what_there_is_are_pointed_out():
    """An anyres image counts with all its crops: 40 tokens are few of it, though more than one crop has."""
    model, inputs = FAMILIES["llava_next"].build(), FAMILIES["llava_next"].batch("one")
    with vtoken.applied(model, "cdpruner", budget=40), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)
        assert vtoken.report(model).tokens_out == 40 + 6  # six newline rows
    with (
        vtoken.applied(model, "cdpruner", budget=400),
        pytest.warns(UserWarning, match="larger than the 64 visual"),
    ):
        model(**inputs)


@pytest.mark.parametrize("name", ["visionzip", "globalcom2"])
def test_reference_layout_changes_the_order_alone(name):
    """The same tokens enter the model in another order: as many, but other logits."""
    model, inputs = FAMILIES["llava_next"].build(), FAMILIES["llava_next"].batch("one")
    out = {}
    for layout in ("spatial", "reference"):
        with vtoken.applied(model, name, budget=0.5, layout=layout, positions="renumber"):
            logits = model(**inputs).logits[0, -1]
            out[layout] = (logits, vtoken.report(model).tokens_out)
    assert out["spatial"][1] == out["reference"][1]
    assert (out["spatial"][0] - out["reference"][0]).abs().max() > 1e-3
