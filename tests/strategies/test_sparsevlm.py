"""SparseVLM: raters, scores, numbers, recycling, and the corrections of its second version."""

from __future__ import annotations

import math

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_same, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from vtoken.strategies import SparseVLM
from vtoken.strategies.common.clusters import density_peaks
from vtoken.strategies.sparsevlm import TABLES, choose_raters, recycled

from .prompts import prompt, run_through


# -- raters --------------------------------------------------------------------------------------------------
def brute_raters(tokens) -> list[int]:
    text = tokens.text_rows.tolist()
    weights = [0.0] * len(text)
    for i in tokens.visual_rows.tolist():
        logits = [float(tokens.hidden_states[i].double() @ tokens.hidden_states[t].double()) for t in text]
        top = max(logits)
        e = [math.exp(x - top) for x in logits]
        weights = [w + x / sum(e) for w, x in zip(weights, e, strict=True)]
    return [t for t, w in zip(text, weights, strict=True) if w > sum(weights) / len(weights)]


@pytest.mark.parametrize("seed", range(4))
def test_raters(seed):
    tokens = prompt(visual=[9, 8], after=8, seed=seed)
    raters = choose_raters(tokens)
    assert raters.tolist() == brute_raters(tokens)
    assert 0 < len(raters) < len(tokens.text_rows)
    order = torch.arange(len(tokens))
    order[tokens.visual_rows] = tokens.visual_rows.flip(0)
    tokens.hidden_states = tokens.hidden_states[order]
    assert choose_raters(tokens).tolist() == raters.tolist()


def test_without_a_difference_all_text_rates():
    tokens = prompt(visual=9, hidden=torch.zeros(3 + 9 + 5, 8))
    assert choose_raters(tokens).tolist() == tokens.text_rows.tolist()


def test_chunks_do_not_matter():
    tokens = prompt(visual=50)
    assert torch.equal(choose_raters(tokens, chunk=7), choose_raters(tokens))


# -- numbers -------------------------------------------------------------------------------------------------
def after_layer(reads: list[int]) -> list[int]:
    """The published count: tokens after every layer."""
    return [*reads[1:], reads[-1]]


@pytest.mark.parametrize(("target", "after"), [(192, (309, 204, 113)), (128, None), (96, None), (64, None)])
def test_published_schedule(target, after):
    for version in ("1.5", "2.0"):
        strategy = SparseVLM(target=target, version=version)
        assert strategy.prefill_layers(32) == (0, 3, 7, 16)
        reads = run_through(strategy, prompt(visual=576, layer=0, after=8))
        counts = [reads[3], reads[7], reads[16]]
        if version == "2.0":
            assert tuple(counts) == TABLES["2.0"][target]
        elif after is not None:
            assert tuple(counts) == after
        mean = sum(after_layer(reads)) / 32
        assert abs(mean - target) < (0.5 if version == "1.5" and target == 192 else 12)


def test_the_published_average_of_192():
    reads = run_through(SparseVLM(target=192), prompt(visual=576, layer=0, after=8))
    assert sum(after_layer(reads)) / 32 == pytest.approx((2 * 576 + 4 * 309 + 9 * 204 + 17 * 113) / 32)


@pytest.mark.parametrize("version", ["1.5", "2.0"])
@pytest.mark.parametrize("budget", [0.12, 0.2, 0.3333, 0.6, 0.95])
@pytest.mark.parametrize("num_layers", [4, 28, 32])
def test_budget_is_the_average_over_the_layers(budget, version, num_layers):
    strategy, n = SparseVLM(budget, version=version), 600
    if num_layers == 4 and budget < 0.25:
        with pytest.raises(ValueError, match="first 1 of 4 layers"):
            strategy.check_depth(num_layers)
        return
    strategy.check_depth(num_layers)
    reads = run_through(strategy, prompt(visual=n, num_layers=num_layers, layer=0, after=8))
    average = sum(reads) / num_layers
    # the merged tokens jump with what is dropped, so that the last number can miss by a few
    assert budget * n - 3 <= average <= budget * n + 1e-6
    assert reads == sorted(reads, reverse=True)


def test_the_schedule_interpolates_the_tables():
    strategy, cuts = SparseVLM(), (3, 7, 16)
    for target, counts in TABLES["1.5"].items():
        assert strategy._kept(576, target / 576, cuts) == list(counts)
    middle = strategy._kept(576, 160 / 576, cuts)
    assert middle == [round((a + b) / 2) for a, b in zip(TABLES["1.5"][192], TABLES["1.5"][128], strict=True)]


def test_rank_mode():
    """Numbers from the rank: copied rater rows lower it by one each, times the scale."""
    visual, text = 40, 10
    n = 3 + visual + text
    attention = torch.rand(1, n, n, generator=torch.Generator().manual_seed(0))
    strategy = SparseVLM(version="1.0", scale=2.0, bias=1.0)

    def kept(attention) -> int:
        tokens = prompt(visual=visual, after=text, attention=attention, heads=1)
        tokens.memory["raters"] = tokens.text_rows
        tokens.layer = 3
        answer = strategy.select_in_prefill(tokens)
        assert answer.into is not None
        return len(answer.keep) - recycled(visual - (2 * rank + 1))

    rank = text
    assert kept(attention) == 2 * text + 1
    copied = attention.clone()
    copied[:, -1] = copied[:, -2]
    rank = text - 1
    assert kept(copied) == 2 * (text - 1) + 1
    assert strategy.prefill_layers(32) == (0, 3, 7, 16, 20)


# -- scores --------------------------------------------------------------------------------------------------
def asked(strategy: SparseVLM, tokens, keep: int, layer: int = 3):
    tokens.memory.setdefault("raters", tokens.text_rows)
    tokens.memory["counts"] = [keep, keep, keep]
    tokens.layer = layer
    return strategy.select_in_prefill(tokens)


def test_raters_after_an_image_rate_it():
    """Text between two images rates the first one only; the mean is over those that can see the token."""
    tokens = prompt(visual=[6, 6], between=3, after=4)
    answer = asked(SparseVLM(recycle=False), tokens, 5)
    raters, visual = tokens.text_rows.tolist(), tokens.visual_rows.tolist()
    attention = tokens.attention_rows(torch.arange(len(tokens))).mean(0)
    scores = [
        sum(float(attention[r, v]) for r in raters if r > v) / sum(r > v for r in raters) for v in visual
    ]
    assert answer.keep.tolist() == sorted(sorted(range(12), key=lambda i: -scores[i])[:5])


def test_an_image_at_the_end_is_rated_by_the_last_token():
    tokens = prompt(visual=12, after=0)
    assert tokens.text_rows.tolist() == [len(tokens) - 1]
    answer = asked(SparseVLM(recycle=False), tokens, 5)
    scores = tokens.attention_rows(torch.tensor([len(tokens) - 1]))[:, 0].mean(0)[tokens.visual]
    assert answer.keep.tolist() == scores.topk(5).indices.sort().values.tolist()


def test_gravity_is_the_rotary_product_of_constant_vectors():
    tokens = prompt(visual=30, dim=16)
    ones, (cos, sin) = torch.ones(16), tokens.rotary

    def rotated(i):
        a, b = ones.chunk(2)
        return ones * cos[i] + torch.cat([-b, a]) * sin[i]

    strategy = SparseVLM(version="2.0", guard=1e-6)
    rows = tokens.text_rows[:2]
    flat = torch.ones(4, 2, 30)
    got = strategy._corrected(tokens, rows, flat)
    for r in range(2):
        for j in (0, 7, 29):
            gravity = float(rotated(int(rows[r])) @ rotated(int(tokens.visual_rows[j]))) / 16**0.5
            assert float(got[0, r, j]) == pytest.approx(1 / max(gravity, 1e-6 * 4.0), rel=1e-3)
    guarded = SparseVLM(version="2.0", guard=0.9)._corrected(tokens, rows, flat)
    assert float(guarded.max()) == pytest.approx(1 / (0.9 * 4.0), rel=1e-4)


def test_with_constant_gravity_version_two_is_version_one_on_the_priority_heads():
    tokens = prompt(visual=20, heads=8)
    tokens.rotary = tuple(torch.ones_like(t) * v for t, v in zip(tokens.rotary, (1.0, 0.0), strict=True))
    answer = asked(SparseVLM(version="2.0"), tokens, 6)
    assert answer.into is None
    attention = tokens.attention_rows(tokens.text_rows)[..., tokens.visual]
    chosen = attention.sum((1, 2)).topk(round(8 * 14 / 32)).indices
    scores = attention[chosen].mean((0, 1))
    assert answer.keep.tolist() == scores.topk(6).indices.sort().values.tolist()


# -- recycling -----------------------------------------------------------------------------------------------
def test_numbers_of_merged_tokens():
    assert [recycled(d) for d in (0, 1, 29, 31, 276, 500)] == [0, 1, 1, 2, 9, 16]
    assert 300 + recycled(576 - 300) == 309


def test_clusters_of_separated_blobs():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0, 0], [40, 0, 0], [0, 40, 0]])
    label = torch.randint(0, 3, (30,), generator=generator)
    label[:3] = torch.tensor([0, 1, 2])
    x = centres[label] + torch.randn(30, 3, generator=generator) * 0.1
    found, cluster = density_peaks(x, 3)
    assert sorted(label[found].tolist()) == [0, 1, 2]
    assert torch.equal(label[found][cluster], label)
    again = density_peaks(x, 3)
    assert torch.equal(found, again[0]) and torch.equal(cluster, again[1])


def test_equal_points_are_one_deterministic_cluster_each():
    found, cluster = density_peaks(torch.ones(12, 4), 3)
    assert found[0] == 0 and len(found.unique()) == 3
    assert cluster[found].tolist() == [0, 1, 2]


def test_recycling_conserves_what_it_merges():
    tokens = prompt(visual=120, after=6, dim=8)
    answer = asked(SparseVLM(), tokens, 20).check(120)
    scores = tokens.attention_rows(tokens.text_rows).mean((0, 1))[tokens.visual]
    kept = scores.topk(20).indices.sort().values
    candidates = int(0.3 * 100) + 1
    dropped = torch.tensor([i for i in range(120) if i not in kept.tolist()])
    best = dropped[scores[dropped].topk(candidates).indices]
    assert len(answer.keep) == 20 + recycled(100)
    assert set(kept.tolist()) <= set(answer.keep.tolist()) <= set(kept.tolist()) | set(best.tolist())
    into, weight = answer.into, answer.weight
    merged = [j for j, i in enumerate(answer.keep.tolist()) if i not in kept.tolist()]
    assert sorted(torch.isin(into, torch.tensor(merged)).nonzero()[:, 0].tolist()) == sorted(best.tolist())
    x = tokens.hidden_states[tokens.visual].double()
    out = answer.dense(120).double() @ x
    for j in merged:
        members = (into == j).nonzero()[:, 0]
        assert torch.allclose(
            weight[members].double(), torch.full((len(members),), 1 / len(members)).double()
        )
        assert torch.allclose(out[j] * len(members), x[members].sum(0), atol=1e-5)
    for j in set(range(len(answer.keep))) - set(merged):
        assert torch.equal(out[j], x[answer.keep[j]])


# -- models --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["1.0", "1.5", "2.0"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
def test_on_a_model(name, version):
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("ragged")
    with patched(model, SparseVLM(0.5, version=version, scale=1.0)) as spy:
        out = run(model, inputs)
        report = vtoken.report(model)
    spy.items.clear()
    assert_same(out, inputs, expected(name, inputs, spy))
    assert report.visual_per_layer[-1] < report.visual_per_layer[0]
    assert any(a.into is not None for layer in spy.drops for _, a in spy.drops[layer]) == (version != "2.0")


def test_bad_options():
    for options in (dict(version="3"), dict(target=100), dict(guard=0.0), dict(layers=(5, 2))):
        with pytest.raises(ValueError):
            SparseVLM(**options)
    with pytest.raises(ValueError, match="pool"):
        vtoken.patch(subject("llava"), SparseVLM(0.2))
