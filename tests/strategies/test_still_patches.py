"""Still patches: which places count as changed, options, and the parts of a combination."""

from __future__ import annotations

import math

import pytest
import torch

from vtoken import VTokenConfig
from vtoken.strategies import combine, create
from vtoken.strategies.assembly import assemble
from vtoken.tokens import TowerInfo

from .common import video

TOWER = TowerInfo(6, 5, False, tuple(range(6)), 4)


def naive(pixels, reference, threshold, margin):
    rows, columns = len(pixels), len(pixels[0])
    moved = set()
    for r in range(rows):
        for c in range(columns):
            a, b = pixels[r][c].flatten().tolist(), reference[r][c].flatten().tolist()
            if math.fsum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a) > threshold:
                moved.add((r, c))
    near = range(-margin, margin + 1)
    grown = {(r + i, c + j) for r, c in moved for i in near for j in near}
    return [[(r, c) in grown for c in range(columns)] for r in range(rows)]


@pytest.mark.parametrize("margin", [0, 1, 2, 9])
@pytest.mark.parametrize("shape", [(5, 7, 4, 6), (1, 1, 1, 3), (9, 2, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_changed_places(shape, margin, dtype):
    generator = torch.Generator().manual_seed(sum(shape) + margin)
    reference = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    pixels = reference + 0.03 * torch.randn(shape, generator=generator).to(dtype)
    some = torch.rand(shape[:2], generator=generator) < 0.1
    pixels[some] += 0.2
    got = create("still_patches", threshold=0.08, margin=margin).changed(pixels, reference)
    assert got.tolist() == naive(pixels, reference, 0.08, margin)
    assert create("still_patches", threshold=0.0, margin=0).changed(pixels, reference).any() == (
        not torch.equal(pixels, reference)
    )
    assert not create("still_patches", threshold=0.0, margin=margin).changed(pixels, pixels).any()


def test_a_difference_of_the_threshold_is_no_change():
    reference, pixels = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)
    pixels[0, 0] = 0.25
    pixels[0, 1, 0] = torch.tensor([0.0, 1.0, 0.0, 0.01])
    assert create("still_patches", threshold=0.25, margin=0).changed(pixels, reference).tolist() == [
        [False, True]
    ]


def test_pixels_that_are_no_numbers_are_a_change():
    """The tower's own answer is no number either, where the picture before would hide it."""
    reference, pixels = torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4)
    pixels[0, 1, 0, 2] = math.nan
    strategy = create("still_patches", threshold=0.25, margin=0)
    assert strategy.changed(pixels, reference).tolist() == [[False, True, False]]
    assert strategy.changed(reference, pixels).tolist() == [[False, True, False]]


def test_what_is_declared():
    strategy = create("still_patches", threshold=0.1, refresh=4)
    assert strategy.reuse(TOWER).interval == 4 and create("still_patches").reuse(TOWER).interval == math.inf
    assert strategy.acts_between_frames and not strategy.acts_on_projector and not strategy.acts_inside
    assert create("still_patches", refresh=1).is_identity and not strategy.is_identity
    assert strategy.counts(video(3).segments) == [8, 8, 8] and strategy.total(video(3).segments) == 24
    assert strategy.total(video(3).segments, budget=0.5) == 24 and "budget" not in strategy.info.defaults
    assert strategy.describe() == "still_patches(threshold=0.1, refresh=4)"
    assert strategy.info.stages == ("pixels",) and strategy.budget_counts() == ""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(threshold=-0.1), "threshold must be a finite number, at least 0, found -0.1"),
        (dict(threshold=math.nan), "threshold must be a finite number"),
        (dict(threshold=math.inf), "threshold must be a finite number"),
        (dict(threshold="low"), "threshold"),
        (dict(margin=-1), "margin must be a number of places, at least 0, found -1"),
        (dict(margin=0.5), "margin must be"),
        (dict(refresh=0), "refresh must be a number of frames, at least 1, or None, found 0"),
        (dict(refresh=2.5), "refresh must be"),
        (dict(budget=0.25), "still_patches has no option 'budget': it takes .*threshold.*margin, refresh"),
    ],
)
def test_bad_options_get_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        create("still_patches", **options)
    assert len(str(caught.value).splitlines()) == 1


def test_the_budget_is_the_projector_strategys_alone():
    both = combine(["still_patches", "farcover"], 0.25, still_patches=dict(threshold=0.1))
    assert both.first.budget == 0.25 and both.info.stages == ("pixels", "projector")
    assert both.describe() == "still_patches(threshold=0.1) then farcover(budget=0.25), sharing budget=0.25"
    assert both.reuse(TOWER) is not None and combine(["still_patches", "random"], 1.0).is_identity is False
    three = combine(["still_patches", "random", "fastv"], 0.25)
    assert [p.info.name for p in three.ordered] == ["still_patches", "random", "fastv"]
    assert three.first.budget == 0.5 and three.then.budget == 0.25
    inside = combine(["fastv", "still_patches"], 0.2)
    assert inside.acts_inside and inside.counts(video(2).segments) == [8, 8]
    for rival, sentence in (
        ("stc_cacher", "both act between frames"),
        ("mustdrop", "merges tokens"),
        ("pvc", "pvc lets frames attend to each other in the vision tower, where still_patches reuses"),
    ):
        with pytest.raises(ValueError, match=sentence):
            combine(["still_patches", rival], 0.5)


@pytest.mark.parametrize("parts", ["still_patches", ["still_patches", "farcover"]])
def test_a_config_makes_the_same_strategy_again(parts):
    options = dict(threshold=0.07, margin=2, refresh=8)
    given = options if isinstance(parts, str) else dict(still_patches=options, budget=0.3)
    made = assemble(parts, None, dict(given))
    config = VTokenConfig.from_dict(VTokenConfig.of(made).to_dict())
    again = assemble(config.strategy, config.budget, dict(config.options))
    assert again == made
