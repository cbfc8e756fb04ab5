"""FastV: the ranking, the cut, and the whole method on a model."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from tests.oracle import clone
from vtoken import Selection
from vtoken.strategies import FastV, Random
from vtoken.strategies.registry import create

from .prompts import prompt


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 0.9, 5, 100])
def test_keeps_what_the_last_token_looks_at(budget):
    tokens = prompt(visual=[10, 7])
    keep = FastV(budget).select_in_prefill(tokens).keep
    count = min(17, max(1, round(17 * budget) if isinstance(budget, float) else 2 * budget))
    scores = tokens.attention_rows(torch.tensor([len(tokens) - 1]))[:, 0].mean(0)[tokens.visual]
    want = sorted(sorted(range(17), key=lambda i: -float(scores[i]))[:count])
    assert keep.tolist() == want


def test_rounds_half_to_even_as_the_public_code():
    assert [len(FastV(0.5).select_in_prefill(prompt(visual=n)).keep) for n in (5, 7, 9)] == [2, 4, 4]


def test_mean_over_the_text_after_the_image():
    tokens = prompt(visual=[6, 6])
    keep = FastV(0.5, query="mean").select_in_prefill(tokens).keep
    text = [i for i in range(3, len(tokens)) if not tokens.visual[i]]
    scores = tokens.attention_rows(torch.tensor(text)).mean((0, 1))[tokens.visual]
    assert keep.tolist() == scores.topk(6).indices.sort().values.tolist()
    assert keep.tolist() != FastV(0.5).select_in_prefill(tokens).keep.tolist()


@pytest.mark.parametrize("query", ["last", "mean"])
def test_a_softmax_over_the_visual_keys_alone(query):
    tokens = prompt(visual=[6, 6])
    text = [len(tokens) - 1]
    if query == "mean":
        text = [i for i in range(3, len(tokens)) if not tokens.visual[i]]
    total = torch.zeros(12, dtype=torch.float64)
    for row in text:
        for head in tokens.attention_rows(torch.tensor([row]))[:, 0].double():
            logits = head[tokens.visual].log()  # up to a constant
            total += logits.exp() / logits.exp().sum()
    keep = FastV(0.5, query=query, softmax="visual").select_in_prefill(tokens).keep
    assert keep.tolist() == total.topk(6).indices.sort().values.tolist()


def test_heads_that_hardly_look_at_the_picture_count_as_others_do():
    tokens = prompt(visual=[6, 6])
    rows = tokens.attention_rows

    def attention(of):
        out = rows(of).clone()
        out[0] *= 1e-6
        return out

    tokens.attention_rows = attention
    kept = {s: FastV(0.5, softmax=s).select_in_prefill(tokens).keep.tolist() for s in ("all", "visual")}
    assert kept["all"] != kept["visual"]
    tokens.attention_rows = rows
    assert FastV(0.5, softmax="visual").select_in_prefill(tokens).keep.tolist() == kept["visual"]


def test_drafts_do_not_rank():
    tokens = prompt(drafts=3)
    keep = FastV(0.3).select_in_prefill(tokens).keep
    scores = tokens.attention_rows(torch.tensor([tokens.end - 1]))[:, 0].mean(0)[tokens.visual]
    assert keep.tolist() == scores.topk(4).indices.sort().values.tolist()


def test_layer_zero_draws_what_the_random_baseline_draws():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    outs, chosen = [], []
    for strategy in (FastV(0.5, layer=0, seed=3), Random(0.5, seed=3)):
        with patched(model, strategy) as spy:
            outs.append(run(model, inputs))
            chosen.append([a.keep for _, a in (spy.drops.get(0) or spy.items)])
        vtoken.unpatch(model)
    # row 0 has one image; row 1 draws from the union of its two
    assert torch.equal(chosen[0][0], chosen[1][0])
    assert torch.equal(outs[0].sequences[0], outs[1].sequences[0])
    assert (outs[0].logits[0][0] - outs[1].logits[0][0]).abs().max() < 1e-4


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next_video/video"])
def test_selection_is_eager_attentions_on_a_model(name, layer):
    """What is kept follows from `output_attentions` of the unpatched model, and the answer is the oracle's."""
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("ragged")
    with torch.no_grad():
        maps = clean(name, "eager")(**clone(inputs), output_attentions=True).attentions[layer - 1]
    with patched(model, FastV(0.4, layer=layer)) as spy:
        out = run(model, inputs)
        report = vtoken.report(model)
    visual = family.visual(inputs)
    counts = []
    for b, (columns, answer) in enumerate(spy.drops[layer]):
        places = visual[b].nonzero()[:, 0]
        assert torch.equal(columns, places)
        counts.append(round(0.4 * len(places)))
        scores = maps[b, :, -1, places].mean(0)
        assert torch.equal(answer.keep, scores.topk(counts[-1]).indices.sort().values)
    spy.items.clear()
    assert_same(out, inputs, expected(name, inputs, spy))
    total = int(visual.sum())
    assert report.visual_per_layer == [total] * layer + [sum(counts)] * (4 - layer)


def test_padding_and_batch_do_not_matter():
    family, model = FAMILIES["llava"], subject("llava")
    batch, one = family.batch("ragged"), family.batch("one")
    with patched(model, FastV(0.3, layer=1)):
        together, alone = run(model, batch), run(model, one)
    assert torch.equal(
        together.sequences[0, batch["input_ids"].shape[1] :], alone.sequences[0, one["input_ids"].shape[1] :]
    )
    assert (together.logits[0][0] - alone.logits[0][0]).abs().max() < 1e-4


def test_static_cache_and_padding_choose_the_same():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    chosen = []
    with patched(model, FastV(0.3, layer=1)) as spy:
        for options in ({}, dict(cache_implementation="static", disable_compile=True)):
            spy.clear()
            run(model, inputs, 2, **options)
            chosen.append([a.keep.tolist() for _, a in spy.drops[1]])
    assert chosen[0] == chosen[1]


def test_whole_budget_is_the_unpatched_model():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with patched(model, FastV(1.0, layer=1)):
        out = run(model, inputs)
    want = run(clean("llava"), inputs)
    assert torch.equal(torch.stack(out.logits), torch.stack(want.logits))


def test_bad_options():
    for options, message in (
        (dict(layer=-1), "layer"),
        (dict(layer=1.5), "layer"),
        (dict(query="first"), "query"),
    ):
        with pytest.raises(ValueError, match=message):
            FastV(**options)
    with pytest.raises(ValueError, match="before LLM layer 7, but this LLM has the layers 0 to 3"):
        vtoken.patch(subject("llava"), create("fastv", layer=7))
    assert isinstance(FastV().select_in_prefill(prompt(visual=1)), Selection)
