"""ZipVL: the important tokens of a layer against a second writing in loops, and what the paper promises of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vtoken.sparse_attention import AttentionTokens
from vtoken.strategies import create
from vtoken.strategies.zipvl import important


def causal(n: int, heads: int = 3, seed: int = 0, sharp: float = 2.0) -> Tensor:
    """(heads, n, n) float64: softmaxed causal attention of random logits."""
    logits = torch.randn(heads, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (sharp * logits).masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf).softmax(-1)


def view(attention: Tensor, asked: list[Tensor] | None = None) -> AttentionTokens:
    n = attention.shape[-1]

    def rows(queries: Tensor) -> Tensor:
        if asked is not None:
            asked.append(queries)
        return attention[:, queries].float()

    return AttentionTokens(0, torch.ones(n, dtype=torch.bool), torch.arange(n), rows)


def naive(attention: Tensor, probes: list[int], tau: float) -> list[int]:
    """Equations 6 to 8, token by token."""
    n = attention.shape[-1]
    mean = attention.sum(0) / len(attention)
    a = [sum(float(mean[r, j]) for r in probes) for j in range(n)]
    mass, p = 0.0, 0
    for value in sorted(a, reverse=True):
        mass, p = mass + value, p + 1
        if mass >= tau * len(probes):
            break
    score = [a[j] / sum(r >= j for r in probes) for j in range(n)]
    score[n - 1] = math.inf
    best = sorted(range(n), key=lambda j: (-score[j], j))
    return sorted(best[:p])


@pytest.mark.parametrize("tau", [0.3, 0.8, 0.975])
@pytest.mark.parametrize("n", [5, 40, 60])
def test_equals_a_second_writing(n, tau):
    attention, asked = causal(n), []
    got = create("zipvl", tau=tau, recent=20, probes=12).attend(view(attention, asked))
    (probes,) = asked
    assert probes.tolist() == sorted(set(probes.tolist())) and len(probes) == min(n, 32)
    assert probes.tolist()[-min(n, 20) :] == list(range(max(0, n - 20), n))
    assert got.keep.tolist() == naive(attention, probes.tolist(), tau)
    assert got.keep.tolist() == sorted(set(got.keep.tolist())) and got.keep[-1] == n - 1


def test_probes_are_the_same_for_one_seed_and_others_for_another():
    attention, drawn = causal(60), []
    for seed in (0, 0, 1):
        create("zipvl", recent=8, probes=8, seed=seed).attend(view(attention, drawn))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_all_tokens_are_probes_of_a_short_prompt():
    asked: list[Tensor] = []
    create("zipvl").attend(view(causal(128), asked))
    assert asked[0].tolist() == list(range(128))


def test_the_number_of_important_tokens_is_the_fewest_and_grows_with_tau():
    received = causal(80, sharp=4.0).mean(0).sum(0)
    counts = [important(received, tau) for tau in torch.linspace(0.05, 1, 20).tolist()]
    assert counts == sorted(counts) and counts[0] < counts[-1] <= 80
    mass = received.sort(descending=True).values.cumsum(0)
    for tau in (0.3, 0.6, 0.9):
        p = important(received, tau)
        assert mass[p - 1] >= tau * 80 > mass[p - 2]


def test_concentrated_attention_needs_few_tokens_and_uniform_attention_its_share():
    assert important(torch.tensor([0.1, 50.0, 0.1, 0.1]), 0.975) == 1
    assert important(torch.ones(64), 0.975) == math.ceil(0.975 * 64)
    assert important(torch.ones(1), 0.01) == 1


def test_a_fixed_number_of_tokens():
    attention = causal(40)
    assert len(create("zipvl", budget=0.3).attend(view(attention)).keep) == 12
    assert len(create("zipvl", budget=7).attend(view(attention)).keep) == 7
    assert create("zipvl", budget=1).attend(view(attention)).keep.tolist() == [39]
    assert len(create("zipvl", budget=99).attend(view(attention)).keep) == 40


def test_all_attention_is_the_unpatched_model():
    assert create("zipvl", tau=1.0).is_identity and create("zipvl", budget=1.0).is_identity
    assert not create("zipvl").is_identity and not create("zipvl", tau=1.0, budget=0.5).is_identity


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(tau=0.0), "tau must lie in"),
        (dict(tau=1.5), "tau must lie in"),
        (dict(recent=0), "recent must be a number of tokens, at least 1"),
        (dict(probes=-1), "probes must be a number of tokens, at least 0"),
        (dict(kv="none"), "kv must be"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        create("zipvl", **options)
