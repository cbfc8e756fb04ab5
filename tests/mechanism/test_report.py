"""The report of a call: tokens read per LLM layer and image, with one meaning in every batch."""

from __future__ import annotations

import gc

import pytest
import torch

import vtoken
from tests.mechanism.common import run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from vtoken import tiny
from vtoken.llm_shape import LanguageModelShape
from vtoken.strategies import FastV, PyramidDrop, combine
from vtoken.tiny.questions import held_out, prepare


def ask(model, processor, pairs, strategy, budget, **options):
    """The report of one batch of prompts."""
    inputs = prepare(processor, pairs)
    with torch.inference_mode(), vtoken.applied(model, strategy, budget=budget, **options):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        return vtoken.report(model)


@pytest.fixture(scope="module")
def shipped():
    return tiny.load("llava")


@pytest.mark.parametrize("prompts", [1, 2, 5])
@pytest.mark.parametrize("strategy", ["vtc_cls", "fastv", ["visionzip", "fastv"]])
def test_an_average_is_per_prompt_however_many_there_are(shipped, strategy, prompts):
    one = ask(*shipped, held_out("llava", 1, 3), strategy, 0.25)
    many = ask(*shipped, held_out("llava", prompts, 3), strategy, 0.25)
    assert many.average_visual_tokens == one.average_visual_tokens == many.to_dict()["average_visual_tokens"]
    assert many.tokens_in == prompts * one.tokens_in and many.prompts == prompts
    line = f"average over 4 LLM layers: {one.average_visual_tokens:.1f}\n"
    assert line in str(many) and ("per prompt" in str(many)) == (prompts > 1)
    assert (f"LLM prefill, {prompts} prompts together" in str(many)) == (prompts > 1)


def test_layers_are_named_with_what_they_read(shipped):
    report = ask(*shipped, held_out("llava", 1, 3), "fastv", 0.5)
    (visual,) = report.visuals
    assert [(r.first, r.last, len(r.keep)) for r in visual.layers] == [(0, 1, 144), (2, 3, 72)]
    assert "LLM layers 0-1: 144 of 144 (100.0%)" in str(
        report
    ) and "LLM layers 2-3: 72 of 144 (50.0%)" in str(report)
    assert "144 -> 144" not in str(report)
    assert report.to_dict()["visuals"][0]["layers"][1] == {"first": 2, "last": 3, "tokens": 72}
    both = ask(*shipped, held_out("llava", 1, 3), ["visionzip", "fastv"], 0.25)
    assert "LLM layers 0-1: 72 of 144" in str(both) and "LLM layers 2-3: 36 of 144" in str(both)
    before = ask(*shipped, held_out("llava", 1, 3), "vtc_cls", 0.25)
    assert "144 -> 36 visual tokens (25.0%)" in str(before) and "LLM layers 0" not in str(before)
    assert [(r.first, r.last, len(r.keep)) for r in before.visuals[0].layers] == [(0, 3, 36)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llava", "ragged"), ("llava", "one"), ("qwen2_5_vl", "ragged"), ("llava_next", "ragged")],
)
@pytest.mark.parametrize(
    "strategy", [FastV(0.4, layer=1), PyramidDrop(0.4), "both"], ids=["fastv", "pyramid", "both"]
)
def test_each_image_has_the_tokens_that_the_strategy_kept(name, kind, strategy):
    """The oracle is what the strategy answered at each layer, about the columns of the whole prompt."""
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch(kind)
    if strategy == "both":
        strategy = combine(["random", "fastv"], 0.25, fastv={"layer": 1})
    with patched(model, strategy) as spy:
        run(model, inputs)
        report = vtoken.report(model)
    visual = family.visual(inputs)
    offsets: dict[int, int] = {}
    for v in report.visuals:
        start = offsets.get(v.row, 0)
        offsets[v.row] = start + v.tokens_in
        mine = visual[v.row].nonzero()[:, 0][start : start + v.tokens_in].tolist()  # columns of this image
        kept = [mine[i] for i in v.keep]
        found = iter(v.layers)
        reads = {layer: r.keep.tolist() for r in found for layer in range(r.first, r.last + 1)}
        for layer in range(len(reads)):
            if layer in spy.drops:
                columns, answer = spy.drops[layer][v.row]
                alive = {int(columns[i]) for i in answer.keep}
                kept = [c for c in kept if c in alive]
            assert [mine[i] for i in reads[layer]] == kept
    assert sorted(reads) == list(range(4)) and any(len(v.layers) > 1 for v in report.visuals)
    assert report.visual_per_layer == [
        sum(len(r.keep) for v in report.visuals for r in v.layers if r.first <= layer <= r.last)
        for layer in range(4)
    ]


def test_beams_leave_the_average_as_it_is(shipped):
    model, processor = shipped
    inputs = prepare(processor, held_out("llava", 2, 3))
    with torch.inference_mode(), vtoken.applied(model, "fastv", budget=0.25):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=3)
        report = vtoken.report(model)
    # releases that encode inside `forward` are given each image once per beam
    assert report.prompts == len(report.visuals) in (2, 6)
    assert report.average_visual_tokens == (144 + 144 + 36 + 36) / 4
    assert [[len(r.keep) for r in v.layers] for v in report.visuals] == [[144, 36]] * report.prompts


def test_it_says_what_the_budget_counts(shipped):
    one = str(ask(*shipped, held_out("llava", 1, 3), "fastv", 0.5)).splitlines()
    assert one[1] == "  the budget counts visual tokens that the LLM reads after the cut"
    both = str(ask(*shipped, held_out("llava", 1, 3), ["random", "pyramiddrop"], 0.5)).splitlines()
    assert both[1].startswith(
        "  the budget counts random: visual tokens that enter the LLM; pyramiddrop: visual tokens"
    )


@pytest.mark.parametrize("prompts", [1, 3])
def test_text_that_the_llm_reads_for_the_choice_counts(shipped, prompts):
    pairs = held_out("llava", prompts, 3)
    asked = ask(*shipped, pairs, "farcover", 0.25)
    blind = ask(*shipped, pairs, "farcover", 0.25, relevance=0.0)
    text = [n - 144 for n in asked.prompt_tokens]
    first = LanguageModelShape.of(shipped[0].config.text_config)
    assert asked.flops_text == sum(first.layer_flops(n) for n in text) > 0 == blind.flops_text
    assert asked.flops == pytest.approx(blind.flops + asked.flops_text)
    assert asked.to_dict()["flops_text"] == asked.flops_text
    assert "FLOP of it to choose by the text" in str(asked) and "by the text" not in str(blind)
    deeper = ask(*shipped, pairs, "farcover", 0.25, depth=0.75)
    assert deeper.flops_text == 3 * asked.flops_text


@pytest.mark.parametrize("strategy", ["vtc_cls", "fastv"])
def test_a_disabled_call_leaves_the_report_as_it_was(shipped, strategy):
    model, processor = shipped
    inputs = prepare(processor, held_out("llava", 1, 3))
    with torch.inference_mode(), vtoken.applied(model, strategy, budget=0.25):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        before = vtoken.report(model).to_dict()
        with vtoken.disabled(model):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert vtoken.report(model).to_dict() == before


@pytest.mark.parametrize("strategy", ["visionzip", "fastv", "cdpruner"])
def test_no_features_stay_alive_after_a_call(strategy):
    """The report outlives a call; the features of its pictures, attention and keys do not."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    with vtoken.applied(model, strategy, budget=0.5), torch.no_grad():
        gc.collect()
        before = {id(x) for x in gc.get_objects() if type(x) is torch.Tensor}
        model(**inputs)
        run(model, inputs, 2)
        gc.collect()
        alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and id(x) not in before]
        assert vtoken.report(model).tokens_out
    assert alive and not [x.shape for x in alive if x.is_floating_point() and x.numel() > 8]
