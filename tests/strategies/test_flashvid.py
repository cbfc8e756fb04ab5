"""FlashVID against a second writing in float64, one token at a time, and its budget as an average over layers."""

from __future__ import annotations

import math

import pytest
import torch

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from vtoken.strategies import create
from vtoken.strategies.common.trees import diverse
from vtoken.tokens import Segment

from .common import answer, image, kept_per_segment, outputs, separators_kept, video
from .flashvid_naive import naive
from .test_divprune import brute


def moving(frames=8, height=3, width=4, seed=0, noise=0.25, cut=None, **options):
    """A picture that changes a little from frame to frame, and wholly at `cut`."""
    tokens = video(frames, height, width, seed=seed, **options)
    n, generator = height * width, torch.Generator().manual_seed(seed + 50)
    x, rows = tokens.features.float(), tokens.patch_rows
    base = torch.randn(2, n, 16, generator=generator)
    mean = torch.randn(2, 1, 16, generator=generator)
    scene = [0 if cut is None or t < cut else 1 for t in range(frames)]
    x[rows] = (noise * x[rows].view(frames, n, 16) + (base + mean)[scene]).flatten(0, 1)
    tokens.features = x.to(tokens.features.dtype)
    return tokens


OPTIONS = [
    {},
    dict(selection="attn_div", min_segments=1),
    dict(min_segments=2, average="published"),
    dict(min_segments=2, rounding="published"),
    dict(min_segments=1, rounding="published", average="published", alpha=0.4),
    dict(segment_threshold=2.0, min_segments=8),
    dict(alpha=0.0, min_segments=3),
    dict(alpha=1.0, expansion=1.0),
    dict(merge_threshold=1.0, min_segments=2),
    dict(merge_threshold=-1.0, min_segments=1, expansion=1.5),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 3])
def test_equals_the_second_writing(options, budget):
    for tokens in (moving(cut=5), moving(6, 1, 7, seed=1, noise=0.5), moving(5, 4, 5, seed=2, trailing=1)):
        strategy = create("flashvid", budget=budget, **options)
        want, _ = naive(tokens, strategy)
        chosen = answer(strategy, tokens)
        rows = [i for i in chosen.keep.tolist() if int(tokens.cells[i]) >= 0]
        assert rows == sorted(want)
        got = outputs(tokens, chosen)[: len(rows)]
        torch.testing.assert_close(got, torch.stack([want[i] for i in rows]), atol=1e-5, rtol=1e-4)
        if strategy.rounding == "exact":
            assert len(chosen.keep) == strategy.total(tokens.segments, int((tokens.cells < 0).sum()))


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.4, 0.7, 2])
def test_as_many_enter_as_the_budget_says(budget):
    for seed in range(4):
        tokens = moving(9, 3, 5, seed=seed, noise=[0.0, 0.1, 0.5, 2.0][seed], cut=4)
        strategy = create("flashvid", budget=budget, min_segments=1 + 2 * seed)
        share = budget if isinstance(budget, float) else budget / 15
        count = min(15, math.ceil(15 * share * 1.25))
        chosen = answer(strategy, tokens)
        assert len(chosen.keep) == 9 * count == strategy.total(tokens.segments)
        own = math.ceil(count * 0.7)
        alone = [i for i in range(len(chosen.keep)) if not bool((chosen.into == i).any())]
        assert len(alone) == 9 * own  # chosen tokens, bit for bit
        more = answer(create("flashvid", budget=budget, rounding="published"), tokens)
        assert 9 * count <= len(more.keep) <= 9 * count + 9


def test_a_still_video_keeps_its_values():
    """Trees run through whole segments; their mean is the token itself, the code's grows with the segment."""
    tokens = moving(8, 4, 5, noise=0.0)
    options = dict(budget=0.5, expansion=1.0, alpha=0.2, min_segments=1, segment_threshold=-1.0)
    chosen = answer(create("flashvid", **options), tokens)
    first, got = tokens.features[:20].double(), outputs(tokens, chosen)
    torch.testing.assert_close(got, first[chosen.keep % 20], atol=1e-5, rtol=1e-5)
    published = answer(
        create("flashvid", budget=0.25, expansion=1.0, alpha=0.2, min_segments=1, average="published"), tokens
    )
    strategy = create("flashvid", budget=0.25, expansion=1.0, alpha=0.2, min_segments=1, merge_threshold=0.99)
    assert torch.equal(answer(strategy, tokens).keep, published.keep)
    _, groups = naive(tokens, strategy)
    longest = max(map(len, groups.values()))
    assert longest > 2
    growth = outputs(tokens, published).norm(dim=1) / first[published.keep % 20].norm(dim=1)
    assert float(growth.max()) > 1.4


def test_of_equal_tokens_the_first_are_chosen_whatever_their_length_rounds_to():
    tokens, strategy = video(4, 6, 6), create("flashvid", budget=0.3, alpha=1.0, selection="attn_div")
    for seed in range(20):
        value = torch.randn(16, generator=torch.Generator().manual_seed(seed))
        tokens.features = value.expand(len(tokens), -1).clone()
        kept = tokens.cells[answer(strategy, tokens).keep].tolist()
        assert kept == [36 * t + i for t in range(4) for i in range(14)]


def test_no_merging_over_time_and_a_segment_per_frame():
    tokens = moving(6, 3, 4)
    for options in (dict(merge_threshold=1.0), dict(segment_threshold=2.0), dict(min_segments=6)):
        chosen = answer(create("flashvid", **options), tokens)
        members = (chosen.into >= 0).nonzero()[:, 0]
        assert torch.equal(members // 12, chosen.keep[chosen.into[members]] // 12)
        assert kept_per_segment(tokens, chosen) == [4] * 6 or "merge_threshold" in options


def test_every_other_token_is_in_one_tree():
    tokens = moving(8, 3, 4, cut=3)
    strategy = create("flashvid", budget=0.25, min_segments=2)
    chosen = answer(strategy, tokens)
    assert int((chosen.into >= 0).sum()) == 8 * (12 - 3)
    total = torch.zeros(len(chosen.keep)).index_add_(
        0, chosen.into[chosen.into >= 0], chosen.weight[chosen.into >= 0]
    )
    absorbs = torch.bincount(chosen.into[chosen.into >= 0], minlength=len(total)) > 0
    torch.testing.assert_close(total[absorbs], torch.ones(int(absorbs.sum())))  # means


def test_equal_attention_gives_the_plain_diverse_tokens():
    tokens = moving(4, 4, 5, noise=1.0)
    x = tokens.features.view(4, 20, -1)
    chosen = diverse(torch.nn.functional.normalize(x, dim=-1), torch.ones(4, 20), 6)
    for frame, mine in zip(x, chosen, strict=True):
        assert mine.nonzero()[:, 0].tolist() == sorted(brute(frame, 6))
    assert diverse(x, torch.zeros(4, 20), 5).sum(1).tolist() == [5] * 4  # never twice
    assert not diverse(x, torch.ones(4, 20), 0).any()
    assert diverse(x[:, :1], torch.ones(4, 1), 1).all()


def test_newlines_and_half_precision():
    tokens = moving(5, 3, 3, trailing=2)
    assert separators_kept(tokens, answer(create("flashvid"), tokens)) == 2
    half = moving(5, 3, 3, dtype=torch.float16)
    want = answer(create("flashvid"), half)
    half.features = half.features.float()
    assert torch.equal(answer(create("flashvid"), half).keep, want.keep)


def test_ends_of_the_budget():
    tokens = moving(5, 3, 4)
    assert kept_per_segment(tokens, answer(create("flashvid", budget=1e-9), tokens)) == [1] * 5
    everything = answer(create("flashvid", budget=99), tokens)
    assert everything.keep.tolist() == list(range(60))
    torch.testing.assert_close(outputs(tokens, everything).float(), tokens.features)
    one = moving(1, 3, 4)
    assert len(answer(create("flashvid", budget=0.5), one).keep) == 8


def test_the_average_over_layers_is_the_budget():
    for layers, cut in ((28, 20), (36, 26), (32, 23), (7, 5), (4, 3), (2, 1)):
        strategy = create("flashvid")
        assert strategy.prefill_layers(layers) == (cut,)
        strategy.check_depth(layers)
    assert create("flashvid", layer=28).prefill_layers(36) == (28,)
    assert create("flashvid", expansion=1.0).prefill_layers(28) == ()
    assert create("flashvid", llm_keep=1.0).prefill_layers(28) == ()
    with pytest.raises(
        ValueError, match=r"reads 1.5 budgets in 20 of 28 layers.*below 1.40, or a lower layer"
    ):
        create("flashvid", expansion=1.5).check_depth(28)
    create("flashvid", expansion=1.5, llm_keep=0.2).check_depth(28)
    with pytest.raises(ValueError, match="LLM layer 30"):
        create("flashvid", layer=30).check_depth(28)


@pytest.mark.parametrize(("budget", "options"), [(0.5, {}), (0.25, {}), (0.5, {"llm_keep": 0.3})])
def test_models_read_the_budget_on_average(budget, options):
    name = "llava_onevision/video"
    model, inputs = subject(name), FAMILIES[name].batch("one")
    strategy = create("flashvid", budget=budget, **options)
    with patched(model, strategy):
        run(model, inputs, 1)
        report = vtoken.report(model)
    text = int(inputs["attention_mask"].sum()) - report.tokens_in
    read = [n - text for n in report.tokens_per_layer]
    assert read[0] == report.tokens_out
    if options:
        assert read[-1] == math.ceil(0.3 * read[0])
    else:
        assert read[-1] < read[0] and sum(read) / 4 <= max(budget * report.tokens_in, (3 * read[0] + 1) / 4)


@pytest.mark.parametrize("name", ["qwen2_5_vl/video", "qwen3_vl/video", "llava_onevision/video"])
@pytest.mark.parametrize("options", [{}, {"expansion": 1.0}])
def test_models_equal_the_oracle(name, options):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    with patched(model, create("flashvid", budget=0.5, **options)) as spy:
        out = run(model, inputs)
        planes = spy.planes_by_row(FAMILIES[name], inputs)
    seen = dict(deepstack=planes) if planes else {}
    assert_same(out, inputs, expected(name, inputs, spy, model=clean(name), **seen))


def test_videos_only_and_options():
    assert image().modality not in create("flashvid").needs(None).modalities
    tokens = video(2)
    tokens.segments = (Segment("frame", (2, 4)), Segment("frame", (2, 4), tokens=7))
    with pytest.raises(ValueError, match=r"flashvid needs frames of equal size, found \[7, 8\] tokens: use"):
        answer(create("flashvid"), tokens)
    for options in (
        dict(expansion=0.9),
        dict(alpha=1.1),
        dict(min_segments=0),
        dict(layer=0),
        dict(llm_keep=2.0),
    ):
        with pytest.raises(ValueError, match=rf"{next(iter(options))} must lie in \["):
            create("flashvid", **options)
