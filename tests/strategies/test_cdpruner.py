"""CDPruner against the determinants it maximises, computed one by one in float64."""

from __future__ import annotations

import pytest
import torch

from vtoken.strategies import create

from .common import answer, anyres, image, kept_per_segment, separators_kept


def kernel(tokens, rows, theta=None, negate=False):
    x, text = tokens.features[rows].double(), tokens.text_embeddings.double()
    cosine = torch.nn.functional.cosine_similarity(x[:, None], text[None], dim=-1).mean(1) * (
        -1 if negate else 1
    )
    r = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())
    if theta is not None:
        r = torch.exp(theta / (2 * (1 - theta)) * r)
    similarity = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    return r[:, None] * similarity * r[None]


def brute(matrix, count):
    chosen = []
    for _ in range(count):
        left = [i for i in range(len(matrix)) if i not in chosen]
        gain = {i: float(torch.logdet(matrix[chosen + [i]][:, chosen + [i]])) for i in left}
        chosen.append(max(left, key=lambda i: (round(gain[i], 8), -i)))
    return sorted(chosen)


@pytest.mark.parametrize("options", [{}, {"theta": 0.5}, {"negate": True}, {"theta": 0.0}])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_equals_brute_force(options, count):
    tokens = image(4, 4, seed=2)
    want = brute(kernel(tokens, torch.arange(16), **options), count)
    assert answer(create("cdpruner", budget=count, **options), tokens).keep.tolist() == want


def test_every_crop_keeps_its_share_of_what_is_fed_and_all_newlines():
    tokens = anyres(2, 1, 4, top=2)
    strategy = create("cdpruner", budget=0.25)
    chosen = answer(strategy, tokens)
    assert kept_per_segment(tokens, chosen) == strategy.counts(tokens.segments) == [4, 2, 2]
    assert separators_kept(tokens, chosen) == 4
    for segment, count in enumerate([4, 2, 2]):
        rows = (tokens.segment_of == segment).nonzero()[:, 0]
        want = rows[brute(kernel(tokens, rows), count)].tolist()
        assert [i for i in chosen.keep.tolist() if tokens.segment_of[i] == segment] == want
    assert separators_kept(tokens, answer(create("cdpruner", budget=0.25, keep_newline=False), tokens)) == 0


def test_a_token_like_the_question_is_kept():
    tokens = image(6, 6, seed=4)
    tokens.features[17] = tokens.text_embeddings.mean(0)
    assert 17 in answer(create("cdpruner", budget=1), tokens).keep
    assert 17 not in answer(create("cdpruner", budget=1, negate=True), tokens).keep


def test_the_question_decides():
    tokens = image(6, 6)
    first = answer(create("cdpruner", budget=6), tokens).keep
    tokens.text_embeddings = -tokens.text_embeddings
    assert not torch.equal(answer(create("cdpruner", budget=6), tokens).keep, first)


def test_without_text_and_with_equal_relevance_only_diversity_counts():
    tokens = image(4, 4)
    tokens.text_embeddings = None
    plain = answer(create("cdpruner", budget=5, theta=0.0), tokens).keep
    assert torch.equal(answer(create("cdpruner", budget=5), tokens).keep, plain)
    tokens.features[8:] = tokens.features[8]
    kept = answer(create("cdpruner", budget=6), tokens).keep
    assert (kept >= 8).sum() == 1


def test_scale_of_features_and_of_text_changes_nothing():
    tokens = image(5, 5)
    strategy = create("cdpruner", budget=6)
    want = answer(strategy, tokens).keep
    tokens.features = tokens.features * (1 + torch.arange(25)[:, None])
    tokens.text_embeddings = tokens.text_embeddings * 7
    assert torch.equal(answer(strategy, tokens).keep, want)


def test_theta_out_of_range():
    with pytest.raises(ValueError, match="theta"):
        create("cdpruner", theta=1.0)
