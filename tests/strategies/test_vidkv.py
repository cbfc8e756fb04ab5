"""vidkv: options, the tokens that it protects, and what its quantisers promise."""

from __future__ import annotations

import pytest
import torch

from vtoken.mechanism.packed_tokens import PackedKeys, PackedValues, protected_tokens
from vtoken.mechanism.quantised import Grouped, from_frequencies, ternary, to_frequencies
from vtoken.storage import Packed, PromptTokens
from vtoken.strategies import combine, create
from vtoken.strategies.vidkv import relevance


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(budget=0.5), "vidkv has no option 'budget'"),
        (dict(key_bits=0.5), r"key_bits must lie in \[1, 2\] or be 4, found 0.5"),
        (dict(key_bits=3), r"key_bits must lie in \[1, 2\] or be 4, found 3.0"),
        (dict(value_bits=1.5), "value_bits must be 1.58, 2 or 4, found 1.5"),
        (dict(protect=1.5), "protect must be a share"),
        (dict(gamma=2.0), "gamma must lie in"),
        (dict(group=0), "residual must be a multiple of group"),
        (dict(group=48), "residual must be a multiple of group, found residual=128 and group=48"),
        (dict(value_groups="head"), "value_groups"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        create("vidkv", **options)


def test_the_paper_is_the_default():
    strategy = create("vidkv")
    assert strategy.storage(4) == Packed(1.5, 1.58, 32, 128, "channel", 0.7, True, True, 0.2, relevance)
    assert not strategy.is_identity and strategy.acts_on_cache and not strategy.acts_inside
    assert strategy.describe() == "vidkv()"
    both = combine(["vidkv", "fastv", "divprune"], 0.25, vidkv=dict(key_bits=2))
    assert [p.info.name for p in both.ordered] == ["divprune", "fastv", "vidkv"]
    assert both.storage(4).key_bits == 2


def test_relevance_is_the_mean_product_with_the_text():
    x, visual = numbers(2, 7, 3), torch.zeros(2, 7, dtype=torch.bool)
    visual[:, 2:6] = True
    real = torch.ones_like(visual)
    real[1, 0] = False
    got = relevance(PromptTokens(visual, real, x))
    for b, text in enumerate(([0, 1, 6], [1, 6])):
        for i in range(7):
            want = sum(float(x[b, i] @ x[b, j]) for j in text) / len(text)
            assert got[b, i] == pytest.approx(want)
    assert relevance(PromptTokens(real, real, x)).tolist() == torch.zeros(2, 7).tolist()


def test_protected_tokens_are_whole_groups_of_the_best():
    scores = torch.tensor([[5.0, 1, 9, 8, 7, 6, 2, 3, 4, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    visual = torch.ones(2, 10, dtype=torch.bool)
    visual[0, 2] = visual[1, 2:] = False
    for share, first, second in (
        (0.5, {3, 4, 5, 0}, {0, 1}),
        (0.0, {3, 4}, {0, 1}),
        (1.0, {*range(10)} - {2, 9}, {0, 1}),
    ):
        group = 4 if share == 0.5 else 2
        got = protected_tokens(scores, visual, share, group)
        assert set(got[0].nonzero()[:, 0].tolist()) == first, share
        assert set(got[1].nonzero()[:, 0].tolist()) == (second if group == 2 else set())


def test_protected_tokens_have_smaller_errors():
    values, protected = numbers(1, 2, 64, 16), torch.zeros(1, 64, dtype=torch.bool)
    protected[0, 8:40:2] = True
    read = PackedValues.of(values, None, Packed(1.5, 1.58, group=16), protected).read()
    error = (read - values).pow(2).mean((1, 3))[0]
    assert error[protected[0]].max() < error[~protected[0]].mean()


def test_hard_channels_are_those_of_the_largest_range():
    keys = numbers(2, 2, 32, 16)
    keys[0, 1, 3, [2, 5, 11, 14]] += 20
    keys[1, 0, 7, [0, 1, 6, 9]] -= 20
    packed = PackedKeys.of(keys, None, Packed(1.25, 1.58, group=32), None)
    assert packed.channels[:, :4].tolist() == [[2, 5, 11, 14], [0, 1, 6, 9]]
    assert packed.hard.channels == 4 and packed.easy.channels == 12
    flat = PackedKeys.of(keys, None, Packed(1, 1.58, group=32), None).read()
    for b, hard in enumerate(packed.channels[:, :4].long()):
        worse, error = (
            (read[b, ..., hard] - keys[b, ..., hard]).pow(2).mean() for read in (flat, packed.read())
        )
        assert error < worse


@pytest.mark.parametrize("m", [1, 2, 3, 8, 9])
def test_frequencies_are_as_many_real_numbers(m):
    x = numbers(3, m)
    f = to_frequencies(x)
    assert f.shape == x.shape and torch.allclose(from_frequencies(f), x)
    assert torch.allclose(to_frequencies(2 * x + x.flip(0)), 2 * f + f.flip(0))
    assert not from_frequencies(torch.zeros(3, m)).any()


def test_more_values_are_zero_with_a_larger_gamma():
    x, before = numbers(1, 1, 32, 8), -1
    for gamma in (0.0, 0.5, 0.7, 1.2):
        read = ternary(Grouped.of(x, 32), gamma).read()
        assert ((read == 0) | (read.sign() == x.sign())).all()
        assert read.abs().unique().numel() <= 1 + 8  # one scale for a channel
        zeros = int((read == 0).sum())
        assert zeros > before
        before = zeros
    assert set(ternary(Grouped.of(x, 32), 0.5, scale=False).read().unique().tolist()) == {-1.0, 0.0, 1.0}


def test_groups_of_one_number_and_of_nothing_are_exact():
    keys = torch.full((1, 1, 4, 4), 3.0)
    keys[:, :, :, 1] = 0.0
    for bits in (2, 4):
        assert torch.equal(PackedKeys.of(keys, None, Packed(bits, 2, group=4), None).read(), keys)
    assert torch.equal(PackedValues.of(keys, None, Packed(2, 1.58, group=4), None).read(), keys)
    zero = torch.zeros(1, 1, 4, 8)
    assert not PackedKeys.of(zero, None, Packed(1.5, 2, group=4), None).read().any()
