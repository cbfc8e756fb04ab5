"""LLaVolta's pooling: runs of tokens, positions, numbers, and the pooled model."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from vtoken.strategies import LLaVolta

from .prompts import prompt


@pytest.mark.parametrize(("n", "stride", "left"), [(12, 4, 3), (14, 4, 3), (3, 8, 1), (7, 1, 7)])
def test_runs_and_their_means(n, stride, left):
    tokens = prompt(visual=n)
    answer = LLaVolta(stride=stride).select_in_prefill(tokens).check(n)
    x = tokens.hidden_states[tokens.visual].double()
    out = answer.dense(n).double() @ x
    runs = [x[i * stride : (i + 1) * stride] for i in range(left)]
    assert torch.allclose(out, torch.stack([r.mean(0) for r in runs]), atol=1e-6)
    # the floored mean of a run's positions
    places = tokens.positions[tokens.visual]
    want = [int(places[i * stride : (i + 1) * stride].double().mean()) for i in range(left)]
    assert places[answer.keep].tolist() == want


def test_images_are_pooled_by_themselves_and_separators_stay():
    tokens = prompt(visual=[9, 10], between=0, separators=[4, 8])
    answer = LLaVolta(stride=3).select_in_prefill(tokens).check(19)
    assert len(answer.keep) == 7 // 3 + 2 + 10 // 3
    assert {4, 8} <= set(answer.keep.tolist())
    x = tokens.hidden_states[tokens.visual].double()
    out = answer.dense(19).double() @ x
    kept = answer.keep.tolist()
    assert torch.equal(out[kept.index(4)], x[4])
    assert torch.allclose(out[1], x[[3, 5, 6]].mean(0)) or torch.allclose(
        out[kept.index(5)], x[[3, 5, 6]].mean(0)
    )
    assert torch.allclose(out[-1], x[15:18].mean(0), atol=1e-6)
    without = LLaVolta(stride=3, keep_newline=False).select_in_prefill(tokens)
    assert len(without.keep) == 7 // 3 + 10 // 3


def test_constant_tokens_stay():
    tokens = prompt(visual=12, hidden=torch.ones(20, 8) * 0.7)
    answer = LLaVolta(0.25).select_in_prefill(tokens)
    assert torch.allclose(answer.dense(12) @ tokens.hidden_states[tokens.visual], torch.full((3, 8), 0.7))


@pytest.mark.parametrize("budget", [0.0625, 0.1, 0.3, 0.5, 7])
def test_what_remains_is_within_the_budget(budget):
    left = len(LLaVolta(budget).select_in_prefill(prompt(visual=[160, 160])).keep)
    allowed = 320 * budget if isinstance(budget, float) else 2 * budget
    assert 0.6 * allowed <= left <= allowed


def test_published_setting():
    strategy = LLaVolta()
    assert strategy.prefill_layers(32) == (16,)
    assert len(strategy.select_in_prefill(prompt(visual=576)).keep) == 576 // 16


@pytest.mark.parametrize("name", ["llava", "qwen2_vl/video", "llava_next"])
def test_on_a_model(name):
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("text_only_row")
    with patched(model, LLaVolta(0.25, layer=1)) as spy:
        out = run(model, inputs)
        report = vtoken.report(model)
    spy.items.clear()
    assert_same(out, inputs, expected(name, inputs, spy))
    assert report.visual_per_layer[0] == report.tokens_in > report.visual_per_layer[1]


def test_before_the_llm():
    """layer=-1 pools the projector's output: the same as pooling the embeddings before layer 0."""
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    outs = []
    for layer in (-1, 0):
        with patched(model, LLaVolta(0.25, layer=layer)) as spy:
            outs.append(run(model, inputs))
            assert bool(spy.items) == (layer == -1)
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert (torch.stack(outs[0].logits) - torch.stack(outs[1].logits)).abs().max() < 1e-4


def test_stride_one_is_the_unpatched_model():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with patched(model, LLaVolta(stride=1, layer=1)):
        out = run(model, inputs)
    assert torch.equal(torch.stack(out.logits), torch.stack(run(clean("llava"), inputs).logits))


def test_bad_options():
    for options in (dict(layer=-2), dict(stride=0)):
        with pytest.raises(ValueError):
            LLaVolta(**options)
