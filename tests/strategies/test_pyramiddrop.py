"""PyramidDrop: numbers per stage, previewed ranking, budgets as averages."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from vtoken.strategies import PyramidDrop

from .prompts import after_keeping, prompt, run_through


def test_published_numbers():
    for strategy in (PyramidDrop(), PyramidDrop(ratio=0.5)):
        assert strategy.prefill_layers(32) == (8, 16, 24)
        reads = run_through(strategy, prompt(visual=576, layer=8))
        assert reads == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert PyramidDrop().prefill_layers(28) == (7, 14, 21)
    assert PyramidDrop().prefill_layers(40) == (10, 20, 30)


@pytest.mark.parametrize("num_layers", [4, 12, 28, 32, 40])
@pytest.mark.parametrize("budget", [0.1, 0.2, 0.3333, 0.47, 0.8, 0.99])
def test_budget_is_the_average_over_the_layers(budget, num_layers):
    strategy, n = PyramidDrop(budget), 600
    layers = strategy.prefill_layers(num_layers)
    strategy.check_depth(num_layers)
    reads = run_through(strategy, prompt(visual=n, num_layers=num_layers, layer=layers[0]))
    average = sum(reads) / num_layers
    assert budget * n - (num_layers - layers[-1]) / num_layers - 1e-6 <= average <= budget * n + 1e-6
    assert reads == sorted(reads, reverse=True) and reads[-1] >= 1


def test_small_budgets_move_the_cuts_towards_the_input():
    assert PyramidDrop(0.2).prefill_layers(32)[0] < 8
    assert PyramidDrop(0.4).prefill_layers(32) == (8, 16, 24)


@pytest.mark.parametrize(
    "budget, num_layers, cuts", [(0.33, 4, (1, 2, 3)), (0.05, 32, (1, 2, 3)), (0.26, 4, (1, 2, 3))]
)
def test_embeddings_are_not_ranked_while_another_cut_reaches_the_budget(budget, num_layers, cuts):
    strategy = PyramidDrop(budget)
    assert strategy.prefill_layers(num_layers) == cuts
    reads = run_through(strategy, prompt(visual=144, num_layers=num_layers, layer=1))
    assert reads[0] == 144 and abs(sum(reads) / num_layers - budget * 144) < 2


def test_embeddings_are_ranked_by_budgets_that_one_full_layer_uses_up():
    assert PyramidDrop(0.25).prefill_layers(4) == PyramidDrop(0.1).prefill_layers(4) == (0, 1, 2)
    assert PyramidDrop(0.03).prefill_layers(32) == (0, 1, 2)


def test_whole_number_budgets():
    tokens = prompt(visual=[300, 300], layer=8)
    reads = run_through(PyramidDrop(128), tokens)
    assert abs(sum(reads) / 32 - 256) < 1
    with pytest.raises(ValueError, match=r"first 8 of 32 layers.*pool"):
        run_through(PyramidDrop(10), prompt(visual=[300, 300], layer=8))
    assert run_through(PyramidDrop(1000), prompt(visual=300, layer=8)) == [300] * 32


def test_ranks_by_the_preview_of_the_next_layer():
    tokens = prompt(visual=20, layer=8)
    keep = PyramidDrop(ratio=0.5).select_in_prefill(tokens).keep
    scores = tokens.preview_rows(torch.tensor([len(tokens) - 1]))[:, 0].mean(0)[tokens.visual]
    assert keep.tolist() == scores.topk(10).indices.sort().values.tolist()
    last = tokens.attention_rows(torch.tensor([len(tokens) - 1]))[:, 0].mean(0)[tokens.visual]
    assert keep.tolist() != last.topk(10).indices.sort().values.tolist()
    later = after_keeping(tokens, keep, 16)
    again = PyramidDrop(ratio=0.5).select_in_prefill(later).keep
    scores = later.preview_rows(torch.tensor([len(later) - 1]))[:, 0].mean(0)[later.visual]
    assert again.tolist() == scores.topk(5).indices.sort().values.tolist()


def test_few_tokens_keep_one():
    assert run_through(PyramidDrop(ratio=0.1), prompt(visual=3, layer=8))[-1] == 1


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "internvl"])
def test_on_a_model(name):
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("ragged")
    with patched(model, PyramidDrop(0.4)) as spy:
        out = run(model, inputs)
        report = vtoken.report(model)
    spy.items.clear()
    assert_same(out, inputs, expected(name, inputs, spy))
    total = int(family.visual(inputs).sum())
    read = report.average_visual_tokens * len(inputs["input_ids"])  # of all prompts
    assert 0.4 * total - 2 <= read <= 0.4 * total
    assert f"average over 4 LLM layers: {report.average_visual_tokens:.1f}" in str(report)


def test_ratio_one_is_the_unpatched_model():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with patched(model, PyramidDrop(ratio=1.0)) as spy:
        out = run(model, inputs)
    assert sorted(spy.drops) == [1, 2, 3]
    want = run(clean("llava"), inputs)
    assert torch.equal(torch.stack(out.logits), torch.stack(want.logits))


def test_a_list_of_ratios_as_in_the_public_code():
    """Shares of the original number; those of one ratio give what it gives."""
    strategy = PyramidDrop(ratio=[0.9, 0.3, 0.1])
    assert run_through(strategy, prompt(visual=41, layer=8)) == [41] * 8 + [36] * 8 + [12] * 8 + [4] * 8
    one, listed = (
        run_through(PyramidDrop(ratio=r), prompt(visual=41, layer=8)) for r in (0.5, (0.5, 0.25, 0.125))
    )
    assert one == listed
    with pytest.raises(ValueError, match="a share for each of the 2 cuts"):
        vtoken.patch(subject("llava"), PyramidDrop(ratio=(0.5, 0.25, 0.1), layers=(1, 2)))


def test_renumbered_positions():
    """The second writing of positions without gaps at every stage is the oracle's."""
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with patched(model, PyramidDrop(0.4, positions="renumber")) as spy:
        out = run(model, inputs)
    spy.items.clear()
    assert_same(out, inputs, expected("llava", inputs, spy, renumber=True))


def test_bad_options():
    for options in (
        dict(layers=(3, 1)),
        dict(layers=()),
        dict(layers=(1, 1)),
        dict(ratio=0.0),
        dict(ratio=1.5),
        dict(ratio=(0.5, 0.0, 0.0)),
        dict(ratio=(0.2, 0.5, 0.1)),
        dict(ratio=(0.5, 0.25)),
        dict(ratio=(0.5,), layers=(1, 2)),
    ):
        with pytest.raises(ValueError):
            PyramidDrop(**options)
    with pytest.raises(ValueError, match="LLM layer 9"):
        vtoken.patch(subject("llava"), PyramidDrop(layers=(1, 9)))
    with pytest.raises(ValueError, match=r"first 3 of 4 layers"):
        vtoken.patch(subject("llava"), PyramidDrop(0.3, layers=(3,)))
