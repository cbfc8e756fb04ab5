"""VisPruner against a loop over pairs, and FasterVLM as one of its options."""

from __future__ import annotations

import pytest
import torch

from vtoken.strategies import create

from .common import LAYERS, answer, image, kept_per_segment, several, top

LAYER = LAYERS - 2


def rows_and_cells(tokens):
    """Per segment, the rows of its tokens and their cells."""
    start = 0
    for segment in tokens.segments:
        rows = [r for r in range(len(tokens)) if start <= int(tokens.cells[r]) < start + segment.size]
        yield rows, [int(tokens.cells[r]) - start for r in rows]
        start += segment.size


def naive(tokens, counts, important=0.5, order="attention"):
    out = []
    for s, (rows, cells) in enumerate(rows_and_cells(tokens)):
        attention = tokens.provided["cls_attention", LAYER][s].double().mean(0)[cells]
        x = tokens.features[rows].double()
        ranked = sorted(range(len(rows)), key=lambda i: (-float(attention[i]), i))
        first = int(counts[s] * important)
        out += [rows[i] for i in ranked[:first]]
        rest, wanted = ranked[first:], counts[s] - first
        while wanted and len(rest) > wanted:
            if order == "raster":
                rest = sorted(rest)
            even, odd = rest[::2], rest[1::2]
            alike = {i: max(float(torch.cosine_similarity(x[i], x[j], dim=0)) for j in odd) for i in even}
            even = sorted(even, key=lambda i: -alike[i])[min(8, len(rest) - wanted) :]
            rest = even + odd
        out += [rows[i] for i in rest] if wanted else []
    return sorted(out)


@pytest.mark.parametrize("options", [{}, dict(order="raster"), dict(important=0.25), dict(important=0.0)])
@several
@pytest.mark.parametrize("budget", [0.5, 0.2, 1, 9])
def test_equals_the_definition(tokens, options, budget):
    strategy = create("vispruner", budget=budget, **options)
    got = answer(strategy, tokens)
    assert got.keep.tolist() == naive(tokens, strategy.counts(tokens.segments), **options)
    assert kept_per_segment(tokens, got) == strategy.counts(tokens.segments)


def test_fastervlm_ranks_by_the_attention_of_the_last_layer():
    tokens = image(8, 9)
    alone = answer(create("vispruner", budget=17, important=1.0), tokens)
    assert alone.keep.tolist() == answer(create("vtc_cls", budget=17, layers=1), tokens).keep.tolist()
    assert alone.keep.tolist() != answer(create("vispruner", budget=17), tokens).keep.tolist()


def test_the_important_half_stays_and_equal_tokens_go():
    """Of the others nine in ten are one vector, of which the thinning leaves few."""
    tokens = image(10, 10)
    attention = tokens.provided["cls_attention", LAYER][0].double().mean(0)
    important = top(attention, 10)
    others = [i for i in range(100) if i not in important]
    unlike = others[::9]
    tokens.features[[i for i in others if i not in unlike]] = tokens.features[others[1]].clone()
    kept = answer(create("vispruner", budget=20), tokens).keep.tolist()
    assert set(important) <= set(kept) and len(kept) == 20
    assert len(set(kept) & set(unlike)) >= 5  # one by chance


@pytest.mark.parametrize("order", ["attention", "raster"])
def test_lengths_change_nothing_where_tokens_are_equal(order):
    tokens, strategy = image(8, 8), create("vispruner", budget=0.3, order=order)
    tokens.features[torch.arange(64) % 8 < 4] = tokens.features[0].clone()
    want, plain = answer(strategy, tokens).keep, tokens.features
    for seed in range(10):
        lengths = torch.rand(64, 1, generator=torch.Generator().manual_seed(seed)) * 10 + 0.1
        tokens.features = plain * lengths
        assert torch.equal(answer(strategy, tokens).keep, want)


def test_options_that_are_none():
    with pytest.raises(ValueError, match=r"important must be a share in \[0, 1\], found 1.5"):
        create("vispruner", important=1.5)
