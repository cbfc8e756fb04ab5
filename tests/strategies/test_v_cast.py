"""V-CAST against its formulas written out frame by frame in float64."""

from __future__ import annotations

import math

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from vtoken.strategies import create
from vtoken.strategies.budgets import divide_by
from vtoken.tokens import Segment

from .common import answer, flat, image, kept_per_segment, separators_kept, top, video


def cosine(a, b, eps=1e-6):
    return float(a @ b) / (max(float(a.norm()), eps) * max(float(b.norm()), eps))


def naive_counts(x, total, tau=0.7, least=1, published=False):
    frames, size = x.shape[:2]
    f = [m / m.norm() for m in x.mean(1)]
    kappa = [1.0] * frames
    for t in range(1, frames - 1):
        kappa[t] = 1 - cosine(f[t] - f[t - 1], f[t + 1] - f[t])
    powers = [math.exp(k / tau) for k in kappa]
    least = min(least, size)
    quota = [p / sum(powers) * (total - frames * least) for p in powers]
    counts = [min(size, least + math.floor(q + 1e-9)) for q in quota]
    order = sorted(range(frames), key=lambda t: -(quota[t] - math.floor(quota[t] + 1e-9)))
    while sum(counts) < total:
        for t in order:
            while counts[t] < size and sum(counts) < total:
                counts[t] += 1
                if not published:
                    break
    return counts


def naive(tokens, total, **options):
    frames = len(tokens.segments)
    x = tokens.features[tokens.patch_rows].double().view(frames, -1, tokens.features.shape[1])
    counts, kept = naive_counts(x, total, **options), []
    for t, count in enumerate(counts):
        norms = [float(v.norm()) for v in x[t]]
        low, high = min(norms), max(norms)
        score = [
            1 - cosine(v, x[t].mean(0)) + (n - low) / (high - low + 1e-6)
            for v, n in zip(x[t], norms, strict=True)
        ]
        kept.append([t * x.shape[1] + i for i in top(score, count)])
    return flat(kept), counts


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.25, 0.6, 0.95])
@pytest.mark.parametrize("options", [{}, {"tau": 0.1}, {"least": 0}, {"least": 3}, {"leftover": "published"}])
def test_equals_the_formulas(ratio, options):
    plain = {k: v for k, v in options.items() if k != "leftover"}
    for tokens in (video(7, 3, 5), video(12, 1, 7, seed=1), video(2, 4, 4, seed=2), video(3, 2, 4)):
        frames, size = len(tokens.segments), tokens.segments[0].size
        total = max(1, round(frames * size * ratio), frames * plain.get("least", 1))
        kept, counts = naive(tokens, total, published=bool(options.get("leftover")), **plain)
        strategy = create("v_cast", budget=ratio, **options)
        chosen = answer(strategy, tokens)
        assert kept_per_segment(tokens, chosen) == counts and sum(counts) == total
        assert all(min(plain.get("least", 1), size) <= k <= size for k in counts)
        assert chosen.keep.tolist() == kept
        assert strategy.total(tokens.segments) == total == sum(strategy.counts(tokens.segments))


def circle(angles, size=64, spread=0.01):
    """Frames whose means lie at these angles, in degrees, of a circle."""
    tokens = video(len(angles), 8, size // 8)
    turns = torch.tensor([math.radians(a) for a in angles]).double()
    centre = torch.zeros(len(angles), 1, 16, dtype=torch.float64)
    centre[:, 0, 0], centre[:, 0, 1] = turns.cos(), turns.sin()
    noise = torch.randn(1, size, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens.features = (centre + spread * (noise - noise.mean(1, keepdim=True))).flatten(0, 1).float()
    return tokens


def test_equal_steps_give_equal_frames_and_a_turn_gives_the_most():
    steady = kept_per_segment(circle(range(0, 80, 10)), answer(create("v_cast"), circle(range(0, 80, 10))))
    assert len(set(steady[1:-1])) <= 2 and max(steady[1:-1]) - min(steady[1:-1]) <= 1
    assert min(steady[0], steady[-1]) > max(steady[1:-1])
    back = circle([0, 10, 20, 30, 20, 10, 0, -10])
    counts = kept_per_segment(back, answer(create("v_cast", budget=0.3), back))
    assert counts.index(max(counts)) == 3 and counts.count(max(counts)) == 1


def test_two_frames_share_equally_and_a_still_video_too():
    tokens = video(2, 4, 4)
    assert kept_per_segment(tokens, answer(create("v_cast", budget=0.5), tokens)) == [8, 8]
    tokens = video(4, 3, 4)
    tokens.features = tokens.features[:12].repeat(4, 1)
    assert kept_per_segment(tokens, answer(create("v_cast", budget=0.5), tokens)) == [6] * 4


def test_what_is_left_over_goes_one_to_a_frame():
    tokens = video(8, 8, 8)
    one, full = (
        answer(create("v_cast", budget=101 / 512, leftover=how), tokens) for how in ("remainder", "published")
    )
    one, full = kept_per_segment(tokens, one), kept_per_segment(tokens, full)
    gained = [a - b for a, b in zip(full, one, strict=True)]
    assert sum(one) == sum(full) == 101 and max(gained) >= 1 and sorted(gained)[-2] <= 0 and min(gained) == -1


def test_division_by_quotas():
    assert divide_by([1.5, 2.25, 0.25], 4, [9, 9, 9]) == [2, 2, 0]
    assert divide_by([1.4, 1.3, 1.3], 4, [9, 9, 9]) == [2, 1, 1]
    assert divide_by([9.0, 0.5, 0.5], 10, [2, 9, 9]) == [2, 4, 4]
    assert divide_by([9.0, 0.6, 0.4], 11, [2, 9, 3]) == [2, 6, 3]
    assert divide_by([1.9, 1.7, 1.4], 5, [3, 9, 9], fill=True) == [3, 1, 1]
    assert divide_by([1.9, 1.7, 1.4], 7, [3, 9, 9], fill=True) == [3, 3, 1]
    assert divide_by([2.9999999999, 1.0], 4, [9, 9]) == [3, 1]


def test_a_far_frame_changes_its_neighbours_alone():
    tokens = video(9, 3, 3, seed=4)
    x = tokens.features.view(9, 9, -1)
    from vtoken.strategies.v_cast import curvature

    def kappa():
        return curvature(torch.nn.functional.normalize(x.mean(1), dim=-1))

    before = kappa()
    x[4] = 10 * torch.randn(9, 16, generator=torch.Generator().manual_seed(9))
    changed = (kappa() - before).abs() > 1e-6
    assert changed.nonzero()[:, 0].tolist() == [3, 4, 5]


def test_permuting_a_frames_tokens_permutes_the_answer():
    tokens, order = video(5, 3, 4), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    before = answer(create("v_cast", budget=0.4), tokens).keep
    tokens.features = tokens.features.view(5, 12, -1)[:, order].flatten(0, 1)
    after = answer(create("v_cast", budget=0.4), tokens).keep
    assert sorted((after // 12 * 12 + order[after % 12]).tolist()) == before.tolist()


def test_budgets_at_their_ends():
    tokens = video(4, 2, 4)
    assert kept_per_segment(tokens, answer(create("v_cast", budget=1), tokens)) == [1] * 4
    assert len(answer(create("v_cast", budget=1e-9), tokens).keep) == 4
    assert len(answer(create("v_cast", budget=1e-9, least=0), tokens).keep) == 1
    assert len(answer(create("v_cast", budget=99), tokens).keep) == 32
    assert len(answer(create("v_cast", least=99), tokens).keep) == 32
    assert len(answer(create("v_cast", budget=0.5), video(1, 2, 4)).keep) == 4


def test_half_precision_is_scored_in_float32():
    tokens = video(6, 4, 4, dtype=torch.float16)
    want = answer(create("v_cast"), tokens).keep
    tokens.features = tokens.features.float()
    assert torch.equal(answer(create("v_cast"), tokens).keep, want)


def test_newlines_modalities_and_options():
    assert separators_kept(video(3, trailing=2), answer(create("v_cast"), video(3, trailing=2))) == 2
    assert image().modality not in create("v_cast").needs(None).modalities
    tokens = video(2)
    tokens.segments = (Segment("frame", (2, 4)), Segment("frame", (2, 4), tokens=7))
    with pytest.raises(ValueError, match=r"v_cast needs frames of equal size, found \[7, 8\] tokens: use"):
        answer(create("v_cast"), tokens)
    assert len(answer(create("v_cast", tau=1e-6), video(5, 2, 4)).keep) == 10
    for options in ({"tau": 0.0}, {"tau": 1e-310}, {"least": -1}):
        with pytest.raises(ValueError, match="tau must be at least 1e-06, least 0 or more, found"):
            create("v_cast", **options)


@pytest.mark.parametrize("name", ["qwen3_vl/video", "llava_onevision/video"])
def test_models_equal_the_oracle(name):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    with patched(model, create("v_cast", budget=0.5)) as spy:
        out = run(model, inputs)
        assert 0 < vtoken.report(model).tokens_out < vtoken.report(model).tokens_in
        planes = spy.planes_by_row(FAMILIES[name], inputs)
    seen = dict(deepstack=planes) if planes else {}
    assert_same(out, inputs, expected(name, inputs, spy, model=clean(name), **seen))
