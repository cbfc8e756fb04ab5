"""STC: the pruner against its formulas written out, its history, and what is declared for the tower."""

from __future__ import annotations

import math

import pytest
import torch

from vtoken import FrameTokens
from vtoken.strategies import create

from .common import answer, anyres, flat, image, kept_per_segment, separators_kept, tower, video

DENOMINATORS = [0.25, 0.5, 1, 2, 4]


def gauss(a, b):
    return sum(math.exp(-float(((a - b) ** 2).sum()) / d) for d in DENOMINATORS)


def unit(v):
    return v / max(float(v.norm()), 1e-12)


def naive_gaussian(frames, k, window=None, fixed=False):
    """Kept places per frame, for frames (m, d) float64."""
    history, kept, channels = [], [], None
    for x in frames:
        mean = x.mean(0)
        variance = ((x - mean) ** 2).mean(0)
        if channels is None or not fixed:
            channels = sorted(range(x.shape[1]), key=lambda c: float(variance[c]))[: x.shape[1] // 2]
        u = x[:, channels]
        history.append(sum(u) / len(u))
        past = history if window is None else history[-window:]
        temporal = unit(sum(past) / len(past))
        y = torch.stack([unit(v) for v in u])
        spatial = sum(y) / len(y)
        score = [gauss(v, spatial) + gauss(v, temporal) for v in y]
        kept.append(sorted(sorted(range(len(x)), key=lambda t: score[t])[:k]))
    return kept


def naive_dual(frames, k, alpha, window=None):
    history, kept = [], []
    for x in frames:
        spatial = sum(x) / len(x)
        past = history if window is None else history[-window:]
        score = [1 - float(unit(v) @ unit(spatial)) for v in x]
        if past:
            temporal = unit(sum(past) / len(past))
            score = [
                alpha * (1 - float(unit(v) @ temporal)) + (1 - alpha) * s
                for v, s in zip(x, score, strict=True)
            ]
        kept.append(sorted(sorted(range(len(x)), key=lambda t: -score[t])[:k]))
        history.append(spatial)
    return kept


def frames_of(tokens):
    return list(
        tokens.features[tokens.patch_rows].double().view(len(tokens.segments), -1, tokens.features.shape[1])
    )


def places(kept, size):
    return flat([[t * size + i for i in frame] for t, frame in enumerate(kept)])


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("budget", [0.25, 0.5, 3])
def test_equals_the_formulas(budget, window):
    for tokens in (video(5, 3, 4), video(4, 2, 5, seed=3)):
        size = tokens.segments[0].size
        k = int(size * budget) if isinstance(budget, float) else budget
        for channels in ("frame", "fixed"):
            chosen = answer(create("stc_pruner", budget=budget, window=window, channels=channels), tokens)
            want = naive_gaussian(frames_of(tokens), k, window, channels == "fixed")
            assert chosen.keep.tolist() == places(want, size)
        for alpha in (0.0, 0.5, 0.9):
            strategy = create("stc_pruner", budget=budget, score="dual_anchor", alpha=alpha, window=window)
            assert answer(strategy, tokens).keep.tolist() == places(
                naive_dual(frames_of(tokens), k, alpha, window), size
            )


def one_by_one(strategy, tokens, order=None):
    """Kept places frame by frame in one stream, each frame a call of its own."""
    size, memory, out = tokens.segments[0].size, {}, []
    for t in range(len(tokens.segments)) if order is None else order:
        frame = video(1, *tokens.segments[0].grid)
        frame.features = tokens.features[t * size : (t + 1) * size]
        out.append(answer(strategy, frame, memory).keep.tolist())
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(window=2),
        dict(channels="fixed"),
        dict(score="dual_anchor"),
        dict(score="dual_anchor", window=2),
    ],
)
def test_frame_by_frame_equals_one_call(options):
    tokens, strategy = video(6, 3, 4), create("stc_pruner", budget=0.3, **options)
    assert places(one_by_one(strategy, tokens), 12) == answer(strategy, tokens).keep.tolist()


@pytest.mark.parametrize("score", ["gaussian", "dual_anchor"])
def test_later_frames_change_nothing_and_earlier_ones_do(score):
    tokens, strategy = video(6, 4, 4), create("stc_pruner", budget=0.4, score=score, alpha=0.9)
    # a history with a direction
    tokens.features[:48] += 3 * torch.randn(16, generator=torch.Generator().manual_seed(5))
    every = one_by_one(strategy, tokens)
    assert one_by_one(strategy, tokens, [0, 1, 2]) == every[:3]
    assert one_by_one(strategy, tokens, [3, 4, 5]) != every[3:]
    # each frame has its own order of channels in "gaussian", but a mean knows no order of frames
    if score == "dual_anchor":
        assert one_by_one(strategy, tokens, [2, 0, 1, 3, 4, 5])[3:] == every[3:]
    shuffled = one_by_one(create("stc_pruner", budget=0.4, channels="fixed"), tokens, [0, 2, 1, 3, 4, 5])
    assert shuffled[3:] == one_by_one(create("stc_pruner", budget=0.4, channels="fixed"), tokens)[3:]


def test_memory_stays_small():
    tokens = video(40, 2, 2)
    for options, most in (
        (dict(), 2),
        (dict(window=3), 1),
        (dict(channels="fixed"), 3),
        (dict(score="dual_anchor"), 2),
    ):
        memory: dict = {}
        answer(create("stc_pruner", **options), tokens, memory)
        assert len(memory) == most and len(memory.get("means", [])) in (0, 3)


def test_an_outlier_stays_and_copies_of_the_mean_go_first():
    tokens = video(2, 3, 3)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1))
    tokens.features[:] = direction
    tokens.features[4] = -direction
    tokens.features[9 + 7] = -2 * direction
    for score in ("gaussian", "dual_anchor"):
        assert answer(create("stc_pruner", budget=1, score=score), tokens).keep.tolist() == [4, 16]


def test_counts_separators_and_whole_frames():
    tokens = video(3, 2, 4, trailing=1)
    chosen = answer(create("stc_pruner", budget=0.5), tokens)
    assert kept_per_segment(tokens, chosen) == [4, 4, 4] and separators_kept(tokens, chosen) == 1
    assert len(answer(create("stc_pruner", budget=99), tokens).keep) == len(tokens)
    assert kept_per_segment(image(4, 4), answer(create("stc_pruner", budget=0.25), image(4, 4))) == [4]
    crops = anyres(2, 1, 4, top=3)
    assert kept_per_segment(crops, answer(create("stc_pruner", budget=0.5), crops)) == [8, 2, 2]


def test_half_precision_is_scored_in_float32():
    tokens = video(3, 3, 4, dtype=torch.float16)
    tokens.features *= 200  # whose variance has no float16
    want = answer(create("stc_pruner"), tokens).keep
    tokens.features = tokens.features.float()
    assert torch.equal(answer(create("stc_pruner"), tokens).keep, want)


def frame_tokens(frames=2, n=9, prefix=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    keys, reference = (
        torch.randn(frames, n, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    return FrameTokens(0, keys, reference, prefix)


@pytest.mark.parametrize(("budget", "count"), [(0.25, 2), (0.01, 1), (0.99, 8), (4, 4), (99, 9)])
def test_the_cacher_chooses_the_lowest_cosines(budget, count):
    tokens = frame_tokens()
    chosen = create("stc_cacher", budget=budget).choose(tokens)
    assert chosen.shape == (2, count)
    for mine, keys, then in zip(chosen, tokens.keys, tokens.reference, strict=True):
        like = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(keys, then, strict=True)]
        assert set(mine.tolist()) == set(sorted(range(9), key=lambda t: like[t])[:count])


def test_the_class_token_may_be_asked_for():
    tokens = frame_tokens(prefix=1)
    tokens.keys[:, 0] = tokens.reference[:, 0]
    assert 0 not in create("stc_cacher", budget=3).choose(tokens)
    assert bool((create("stc_cacher", budget=3, always_cls=True).choose(tokens) == 0).any(1).all())


def test_what_is_declared():
    info = tower(layers=5)
    reuse = create("stc_cacher", interval=3, share_selection=True).reuse(info)
    assert (reuse.layers, reuse.interval, reuse.shared) == ((0, 1, 2, 3, 4), 3, True)
    both = create("stc", recompute=0.5, interval=7, always_cls=True)
    assert both.reuse(info).interval == 7 and both.budget == 0.3 and both.acts_on_projector
    assert both.reuse(info).choose(frame_tokens()).shape == (2, 4)
    assert create("stc", recompute=1.0).reuse(info) is None and create("stc", interval=1).reuse(info) is None
    assert create("stc_cacher", interval=1).is_identity and not create("stc_cacher").is_identity
    assert (
        create("stc_cacher").counts(video(3).segments) == [8, 8, 8]
        and not create("stc_cacher").acts_on_projector
    )


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("stc_cacher", dict(interval=0), "interval must be a whole number of frames"),
        ("stc_cacher", dict(interval=2.5), "interval must be a whole number"),
        ("stc_cacher", dict(budget=0.0), "budget"),
        ("stc_pruner", dict(score="cosine"), "score must be one of gaussian, dual_anchor"),
        ("stc_pruner", dict(channels="all"), "channels must be one of frame, fixed"),
        ("stc_pruner", dict(window=0), "window must be a number of frames"),
        ("stc_pruner", dict(alpha=1.5), r"alpha must lie in \[0, 1\]"),
        ("stc", dict(recompute=0), "recompute or interval of stc"),
        ("stc", dict(interval=0), "recompute or interval of stc"),
    ],
)
def test_options_out_of_range(name, wrong, says):
    with pytest.raises(ValueError, match=says):
        create(name, **wrong)
