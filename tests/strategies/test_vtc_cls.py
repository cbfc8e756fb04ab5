"""VTC-CLS: the properties in its description."""

from __future__ import annotations

import pytest
import torch

from vtoken.strategies import create
from vtoken.tokens import TowerInfo

from .common import (
    HEADS,
    LAYERS,
    answer,
    anyres,
    build,
    image,
    kept_cells,
    kept_per_segment,
    separators_kept,
    top,
    video,
)

FEATURE = LAYERS - 2


def score(tokens, layers, ensemble="mean", segment=0):
    maps = torch.stack([tokens.provided["cls_attention", i][segment].mean(0).double() for i in layers])
    return {"mean": maps.sum(0), "max": maps.amax(0), "min": maps.amin(0)}[ensemble]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_last_k_layers_up_to_the_feature_layer(k):
    tokens = image(6, 6, seed=k)
    chosen = answer(create("vtc_cls", budget=0.25, layers=k), tokens)
    start = LAYERS - 1 - k
    assert chosen.keep.tolist() == top(score(tokens, range(start, LAYERS - 1)), 9)
    assert torch.equal(answer(create("vtc_cls", budget=0.25, start_layer=start), tokens).keep, chosen.keep)


def test_more_layers_than_there_are_means_all_up_to_the_feature_layer():
    tokens = image(6, 6)
    want = top(score(tokens, range(LAYERS - 1)), 9)
    assert answer(create("vtc_cls", budget=0.25, layers=99), tokens).keep.tolist() == want
    assert answer(create("vtc_cls", budget=0.25, start_layer=0), tokens).keep.tolist() == want


@pytest.mark.parametrize("ensemble", ["mean", "max", "min"])
def test_ensembles(ensemble):
    tokens = image(6, 6)
    chosen = answer(create("vtc_cls", budget=10, ensemble=ensemble), tokens)
    assert chosen.keep.tolist() == top(score(tokens, range(2, 5), ensemble), 10)


def test_the_last_layer_and_early_ones_do_not_matter():
    tokens, strategy = image(5, 5), create("vtc_cls", budget=0.3)
    want = answer(strategy, tokens).keep
    for layer in (0, 1, LAYERS - 1):
        tokens.provided["cls_attention", layer] = torch.rand(1, HEADS, 25)
    assert torch.equal(answer(strategy, tokens).keep, want)
    tokens.provided["cls_attention", 2] = torch.rand(1, HEADS, 25) * 9
    assert not torch.equal(answer(strategy, tokens).keep, want)


@pytest.mark.parametrize("count", [1, 2, 24, 25, 99])
def test_exactly_u_tokens(count):
    tokens = image(5, 5)
    keep = answer(create("vtc_cls", budget=count), tokens).keep
    assert keep.tolist() == top(score(tokens, range(2, 5)), min(count, 25))


def test_windowed_layers_are_passed_over():
    info = TowerInfo(6, 5, True, (1, 3, 5), HEADS)
    tokens = build(list(image(4, 4).segments), info=info)
    needs = create("vtc_cls", layers=2).needs(info)
    assert needs.cls_attention == (3, 5)
    assert answer(create("vtc_cls", budget=4, layers=2), tokens).keep.tolist() == top(
        score(tokens, (3, 5)), 4
    )


def test_every_crop_keeps_its_share_and_newlines_stay():
    tokens = anyres(2, 2, 4, top=1)
    strategy = create("vtc_cls", budget=0.25)
    chosen = answer(strategy, tokens)
    assert kept_per_segment(tokens, chosen) == strategy.counts(tokens.segments) == [4, 3, 3, 3, 3]
    assert separators_kept(tokens, chosen) == 6
    have = set(tokens.cells.tolist())
    for s in range(5):
        scores = score(tokens, range(2, 5), segment=s)
        scores = torch.tensor([v if 16 * s + i in have else -1.0 for i, v in enumerate(scores.tolist())])
        mine = [c - 16 * s for c in kept_cells(tokens, chosen) if c // 16 == s]
        assert sorted(mine) == top(scores, 4 if s == 0 else 3)
    assert separators_kept(tokens, answer(create("vtc_cls", budget=0.25, keep_newline=False), tokens)) == 0


def test_frames_keep_their_share():
    tokens = video(3, 2, 4)
    assert kept_per_segment(tokens, answer(create("vtc_cls", budget=0.5), tokens)) == [4, 4, 4]
    assert kept_per_segment(tokens, answer(create("vtc_cls", budget=2), tokens)) == [2, 2, 2]


def test_heads_are_averaged_and_not_voted():
    tokens = image(1, 4)
    rows = torch.tensor([[0.9, 0.0, 0.0, 0.0], [0.0, 0.3, 0.31, 0.3]])
    for layer in range(LAYERS):
        tokens.provided["cls_attention", layer] = rows[None]
    assert answer(create("vtc_cls", budget=2), tokens).keep.tolist() == [0, 2]


def test_bad_options():
    for options in ({"layers": 0}, {"ensemble": "median"}, {"score": "keys"}, {"start_layer": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            create("vtc_cls", **options)
