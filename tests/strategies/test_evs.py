"""EVS against a double loop in float64, its counts, and its frames in a stream."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from vtoken.strategies import create
from vtoken.strategies.evs import EVS
from vtoken.tokens import Segment

from .common import answer, image, kept_per_segment, separators_kept, top, video


def changes(tokens):
    """(T * M,) list: 1 - cos to the token one frame before, the first frame above everything."""
    frames = len(tokens.segments)
    x = tokens.features[tokens.patch_rows].double().view(frames, -1, tokens.features.shape[1])
    out = [float("inf")] * x.shape[1]
    for t in range(1, frames):
        for now, before in zip(x[t], x[t - 1], strict=True):
            out.append(1 - float(now @ before / (now.norm() * before.norm())))
    return out


def formula(frames, size, q):
    return max(size, int(frames * size * (1 - q)))


@pytest.mark.parametrize("q", [0.1, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 64])
def test_equals_the_loop(frames, q):
    for size in ((2, 4), (1, 7), (3, 3)):
        tokens, strategy = video(frames, *size, trailing=1), create("evs", q=q)
        chosen, n = answer(strategy, tokens), size[0] * size[1]
        count = formula(frames, n, q)
        assert chosen.keep.tolist() == [*top(changes(tokens), count), len(tokens) - 1]
        assert set(range(n)) <= set(chosen.keep.tolist())
        # known without a tensor
        assert strategy.total(tokens.segments, 1) == count + 1
        assert sum(strategy.counts(tokens.segments)) == count


def test_the_floor_is_that_of_double_precision():
    assert create("evs", q=0.9).total([Segment("frame", (10, 10))] * 10) == 100  # the first frame
    assert create("evs", q=0.9).total([Segment("frame", (5, 10))] * 20) == 99
    assert create("evs", budget=0.1).total([Segment("frame", (5, 10))] * 20) == 99
    segments = [Segment("frame", (16, 16))]
    assert [create("evs", q=0.7).total(segments * t) for t in (1, 2, 3, 4)] == [256, 256, 256, 307]


def test_whole_numbers_count_per_frame():
    tokens = video(5, 2, 4)
    assert len(answer(create("evs", budget=3), tokens).keep) == 15
    assert kept_per_segment(tokens, answer(create("evs", budget=1), tokens)) == [8, 0, 0, 0, 0]
    assert len(answer(create("evs", budget=99), tokens).keep) == 40
    assert len(answer(create("evs", budget=1e-9), tokens).keep) == 8


def test_a_still_video_keeps_the_earliest():
    tokens = video(4, 3, 5)
    tokens.features = tokens.features[:15].repeat(4, 1)
    assert answer(create("evs", budget=0.6), tokens).keep.tolist() == list(range(36))


def test_a_flash_costs_two_tokens_and_goes_before_all_others():
    tokens = video(5, 2, 4)
    tokens.features = tokens.features[:8].repeat(5, 1) + 1e-3 * tokens.features
    tokens.features[2 * 8 + 3] *= -1
    kept = answer(create("evs", budget=2), tokens).keep.tolist()
    assert set(kept) - set(range(8)) == {2 * 8 + 3, 3 * 8 + 3}


def test_scale_changes_nothing():
    tokens = video(6, 3, 3, seed=2)
    want = answer(create("evs", budget=0.4), tokens).keep
    tokens.features = tokens.features * (0.1 + torch.rand(len(tokens), 1))
    assert torch.equal(answer(create("evs", budget=0.4), tokens).keep, want)


def test_exact_dtype_ranks_what_the_model_computes():
    tokens = video(8, 4, 4, dtype=torch.bfloat16)
    x = tokens.features.view(8, 16, -1)
    change = 1 - torch.cosine_similarity(x[1:], x[:-1], dim=-1)
    assert change.dtype == torch.bfloat16
    want = top([9.0] * 16 + change.flatten().tolist(), 51)
    exact = answer(create("evs", budget=0.4, exact_dtype=True), tokens).keep.tolist()
    assert exact == want != answer(create("evs", budget=0.4), tokens).keep.tolist()


def test_q_is_another_way_to_say_the_budget():
    strategy, tokens = create("evs", q=0.4), video(4, 3, 5)
    same = answer(create("evs", budget=0.6), tokens).keep
    assert torch.equal(answer(strategy, tokens).keep, same) and len(same) == 36
    assert (strategy.q, strategy.budget) == (0.4, 0.6) and create("evs", q=0).is_identity
    # another budget takes the place of both
    assert strategy.with_budget(0.5).total(tokens.segments) == strategy.total(tokens.segments, 0, 0.5) == 30
    saved = vtoken.VTokenConfig.from_dict(vtoken.VTokenConfig.of(create("evs", q=0.9)).to_dict())
    assert saved.options == {"q": 0.9} and saved.budget == 1 - 0.9
    strategy = create("evs")
    strategy.q = 0.25
    assert strategy.budget == 0.75
    strategy.q = 0.5
    assert strategy.budget == 0.5
    for budget in (EVS.budget, 0.4):
        with pytest.raises(ValueError, match=r"without budget, found 0.5 and 0\.[34]"):
            strategy.budget = budget
    for options in (dict(q=1.0), dict(q=-0.1), dict(q=0.7, budget=0.5), dict(q=0.7, budget=5)):
        with pytest.raises(ValueError, match=r"q must lie in \[0, 1\), without budget, found"):
            create("evs", **options)


def test_newline_rows():
    assert separators_kept(video(3, trailing=2), answer(create("evs"), video(3, trailing=2))) == 2
    without = answer(create("evs", keep_newline=False), video(3, trailing=2))
    assert separators_kept(video(3, trailing=2), without) == 0


def test_a_stream_goes_on_from_the_last_frame():
    tokens, memory, kept = video(6, 3, 4, seed=1), {}, []
    change = changes(tokens)
    for first, last in ((0, 1), (1, 2), (2, 5), (5, 6)):
        part = video(last - first, 3, 4)
        part.features = tokens.features[first * 12 : last * 12]
        kept.append([first * 12 + i for i in answer(create("evs", budget=0.25), part, memory).keep.tolist()])
    assert kept[0] == list(range(12)) and [len(k) for k in kept] == [12, 3, 9, 3]
    for (first, last), mine in zip(((1, 2), (2, 5), (5, 6)), kept[1:], strict=True):
        own = change[first * 12 : last * 12]
        assert mine == [first * 12 + i for i in top(own, len(mine))]
    assert list(memory) == ["frame"] and memory["frame"].shape == (12, 16)
    with pytest.raises(ValueError, match="A stream has one size, found 12 and 4 tokens: start anew"):
        answer(create("evs"), video(1, 2, 2), memory)


def test_videos_only_and_frames_of_one_size():
    assert image().modality not in create("evs").needs(None).modalities
    tokens = video(2)
    tokens.segments = (Segment("frame", (2, 4)), Segment("frame", (2, 4), tokens=7))
    with pytest.raises(ValueError, match=r"evs needs frames of equal size, found \[7, 8\] tokens: use"):
        answer(create("evs"), tokens)
    assert create("evs").total(tokens.segments) is None


def test_agrees_with_transformers_own():
    """Nemotron-H Omni of transformers 5.23 has the method built in."""
    own = pytest.importorskip("transformers.models.nemotron_h_omni.modeling_nemotron_h_omni")
    for rate in (0.3, 0.7, 0.95):
        tokens = video(6, 3, 4, seed=3)
        mask = own.compute_retention_mask(tokens.features[None], 6, rate).flatten()
        kept = answer(create("evs", q=rate, exact_dtype=True), tokens).keep
        assert kept.tolist() == mask.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", ["qwen2_5_vl/video", "llava_onevision/video"])
def test_models_equal_the_oracle(name):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    with patched(model, create("evs", budget=0.6)) as spy:
        out = run(model, inputs)
        assert 0 < vtoken.report(model).tokens_out < vtoken.report(model).tokens_in
    assert_same(out, inputs, expected(name, inputs, spy, model=clean(name)))
