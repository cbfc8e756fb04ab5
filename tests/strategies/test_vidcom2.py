"""VidCom2 against its formulas written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from vtoken.strategies import create

from .common import answer, flat, image, kept_per_segment, separators_kept, video

WIDTHS = [1 / 8, 1 / 4, 1 / 2, 1, 2]


def naive(tokens, ratio, tau=0.01, similarity="gaussian"):
    """Kept indices per frame, counts and frame ratios."""
    frames = len(tokens.segments)
    x = tokens.features[tokens.patch_rows].double()
    m = len(x) // frames
    if similarity == "gaussian":
        variance = ((x - x.mean(0)) ** 2).mean(0)
        channels = sorted(range(x.shape[1]), key=lambda d: (float(variance[d]), d))[: x.shape[1] // 2]
        y = torch.stack([v / max(float(v.norm()), 1e-12) for v in x[:, channels]])

        def close(a, b):
            return sum(math.exp(-float(((a - b) ** 2).sum()) / (2 * w)) for w in WIDTHS)

        centre, centres = y.mean(0), [y[t * m : (t + 1) * m].mean(0) for t in range(frames)]
    else:
        y = x

        def close(a, b):
            return float(a @ b / (a.norm() * b.norm()))

        centre, centres = x.mean(0), [x[t * m : (t + 1) * m].mean(0) for t in range(frames)]
    video_score = [close(y[i], centre) for i in range(frames * m)]
    frame_score = [close(y[i], centres[i // m]) for i in range(frames * m)]
    unusual = [-sum(video_score[t * m : (t + 1) * m]) / m for t in range(frames)]
    powers = [math.exp((u - max(unusual)) / tau) for u in unusual]
    shares = [p / sum(powers) for p in powers]
    ratios = [min(ratio * (1 + s - 1 / frames), 1) for s in shares]
    counts = [max(1, round(r * m)) for r in ratios]
    kept = []
    for t in range(frames):
        order = sorted(range(t * m, (t + 1) * m), key=lambda i: (video_score[i] + frame_score[i], i))
        kept.append(sorted(order[: counts[t]]))
    return kept, counts, ratios


def tame(tokens):
    """Frames that differ gently, so that no frame takes all."""
    tokens.features = tokens.features.double()
    tokens.features = (tokens.features[:8].repeat(len(tokens.segments), 1) + 0.02 * tokens.features).float()
    return tokens


@pytest.mark.parametrize("similarity", ["gaussian", "cosine"])
@pytest.mark.parametrize("ratio", [0.15, 0.25, 0.6])
@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_equals_the_formulas(similarity, ratio, tau):
    for tokens in (video(4), video(3, 3, 3, seed=1), tame(video(5))):
        kept, counts, _ = naive(tokens, ratio, tau, similarity)
        chosen = answer(create("vidcom2", budget=ratio, tau=tau, similarity=similarity), tokens)
        assert kept_per_segment(tokens, chosen) == counts
        assert chosen.keep.tolist() == flat(kept)


def test_equal_frames_share_evenly_and_keep_the_same_places():
    tokens = video(4)
    tokens.features = tokens.features[:8].repeat(4, 1)
    strategy = create("vidcom2", budget=0.4)
    chosen = answer(strategy, tokens)
    assert kept_per_segment(tokens, chosen) == [3] * 4 == strategy.counts(tokens.segments)
    assert len({tuple((tokens.cells[chosen.keep] % 8)[i : i + 3].tolist()) for i in range(0, 12, 3)}) == 1


def test_an_unrelated_frame_gets_the_most():
    tokens = video(5)
    other = tokens.features[16:24].clone()
    tokens.features = tokens.features[:8].repeat(5, 1)
    tokens.features[16:24] = other
    counts = kept_per_segment(tokens, answer(create("vidcom2", budget=0.4), tokens))
    assert counts.index(max(counts)) == 2 and counts.count(max(counts)) == 1
    low, high = 0.4 * (1 - 1 / 5), min(1, 0.4 * (2 - 1 / 5))
    assert all(low * 8 - 0.5 <= c <= high * 8 + 0.5 for c in counts)


def test_a_clipped_frame_keeps_everything():
    tokens = video(3)
    other = tokens.features[8:16].clone()
    tokens.features = tokens.features[:8].repeat(3, 1)
    tokens.features[8:16] = -other
    counts = kept_per_segment(tokens, answer(create("vidcom2", budget=0.75, tau=1e-6), tokens))
    assert counts == [round(0.75 * (2 / 3) * 8), 8, round(0.75 * (2 / 3) * 8)]


def test_permuting_frames_permutes_the_answer():
    tokens, order = video(4), [2, 0, 3, 1]
    strategy = create("vidcom2", budget=0.4)
    before = answer(strategy, tokens).keep
    per_frame = [[i % 8 for i in before.tolist() if i // 8 == t] for t in range(4)]
    tokens.features = tokens.features.view(4, 8, -1)[order].flatten(0, 1)
    after = answer(strategy, tokens).keep
    assert [[i % 8 for i in after.tolist() if i // 8 == t] for t in range(4)] == [per_frame[t] for t in order]


def test_order_and_noise_of_unselected_channels_and_scale_change_nothing():
    tokens, strategy = video(4), create("vidcom2", budget=0.3)
    tokens.features[:, 5] *= 100  # the largest variance: not selected
    want = answer(strategy, tokens).keep
    tokens.features[:, 5] += 1000 * torch.randn(len(tokens))
    assert torch.equal(answer(strategy, tokens).keep, want)
    tokens.features = tokens.features.flip(1)
    assert torch.equal(answer(strategy, tokens).keep, want)
    tokens.features = tokens.features * 4
    assert torch.equal(answer(strategy, tokens).keep, want)


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.33, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_exact_reaches_the_target(ratio, seed):
    tokens = video(6, 3, 3, seed=seed)
    chosen = answer(create("vidcom2", budget=ratio, exact=True), tokens)
    assert len(chosen.keep) == max(6, math.floor(6 * 9 * ratio))
    assert min(kept_per_segment(tokens, chosen)) >= 1
    free = set(answer(create("vidcom2", budget=ratio), tokens).keep.tolist())
    exact = set(chosen.keep.tolist())
    assert free <= exact or exact <= free


def test_budget_in_tokens_per_frame():
    tokens = video(4)
    tokens.features = tokens.features[:8].repeat(4, 1)
    assert kept_per_segment(tokens, answer(create("vidcom2", budget=3), tokens)) == [3] * 4
    assert len(answer(create("vidcom2", budget=99), tokens).keep) == len(tokens)


def test_one_frame_and_a_newline_after_the_video():
    tokens = video(1, trailing=1)
    chosen = answer(create("vidcom2", budget=0.5), tokens)
    assert kept_per_segment(tokens, chosen) == [4] and separators_kept(tokens, chosen) == 1
    assert separators_kept(video(3, trailing=2), answer(create("vidcom2"), video(3, trailing=2))) == 2


def test_videos_only():
    assert create("vidcom2").needs(None).modalities == ("video",)
    assert create("vidcom2").budget == 0.25
    assert image(2, 2).modality not in create("vidcom2").needs(None).modalities


def test_half_precision_is_scored_in_float32():
    tokens = video(4, dtype=torch.float16)
    want = answer(create("vidcom2"), tokens).keep
    tokens.features = tokens.features.float()
    assert torch.equal(answer(create("vidcom2"), tokens).keep, want)
