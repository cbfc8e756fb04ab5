"""Blank patches: which places share one, options, and the parts of a combination."""

from __future__ import annotations

import math

import pytest
import torch

from vtoken import PixelReuse, VTokenConfig
from vtoken.strategies import combine, create
from vtoken.strategies.assembly import assemble
from vtoken.tokens import TowerInfo

from .common import video

TOWER = TowerInfo(6, 5, False, tuple(range(6)), 4)


def naive(pixels, threshold, margin, block):
    """Place by place in plain numbers -> per place the one that it takes its rows from."""
    rows, columns = len(pixels), len(pixels[0])
    places = [(r, c) for r in range(rows) for c in range(columns)]
    means, blank = {}, set()
    for r, c in places:
        bands = [pixels[r][c].unflatten(-1, (3, -1))[:, k].flatten().tolist() for k in range(3)]
        means[r, c] = [math.fsum(band) / len(band) for band in bands]
        off = [abs(x - mean) for band, mean in zip(bands, means[r, c], strict=True) for x in band]
        if all(x <= threshold for x in off):
            blank.add((r, c))
    free = [
        (r, c)
        for r, c in places
        if all(max(abs(r - i), abs(c - j)) > margin for i, j in places if (i, j) not in blank)
    ]
    side = min(block, max(rows, columns))
    out = [[r * columns + c for c in range(columns)] for r in range(rows)]
    for r, c in free:
        mine = [(i, j) for i, j in free if (i // side, j // side) == (r // side, c // side)]
        top, left = r // side * side + (side - 1) / 2, c // side * side + (side - 1) / 2
        i, j = min(mine, key=lambda p: ((p[0] - top) ** 2 + (p[1] - left) ** 2, p))
        if all(abs(a - b) <= threshold for a, b in zip(means[r, c], means[i, j], strict=True)):
            out[r][c] = i * columns + j
    return out


def page(shape, dtype, colours=2):
    """Noise of 0.02 on areas of one colour, with content in some places."""
    generator = torch.Generator().manual_seed(sum(shape))
    rows, columns, patches, values = shape
    colour = torch.randn(colours, 3, generator=generator, dtype=torch.float64)
    each = colour[torch.arange(rows) * colours // rows]
    pixels = each[:, None, None, :, None].repeat(1, columns, patches, 1, values // 3).flatten(3)
    pixels += 0.02 * torch.rand(shape, generator=generator, dtype=torch.float64)
    some = torch.rand(shape[:2], generator=generator) < 0.06
    pixels[some] = torch.randn(shape, generator=generator, dtype=torch.float64)[some]
    return pixels.to(dtype)


@pytest.mark.parametrize(("margin", "block"), [(0, 4), (1, 4), (0, 3), (2, 5), (0, 2), (0, 99), (9, 4)])
@pytest.mark.parametrize("shape", [(9, 14, 4, 6), (1, 1, 1, 3), (13, 2, 1, 12)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_places_that_share_one(shape, margin, block, dtype):
    pixels = page(shape, dtype)
    strategy = create("blank_patches", threshold=0.08, margin=margin, block=block)
    got = strategy.origins(pixels)
    assert got.tolist() == naive(pixels.double(), 0.08, margin, block) and got.dtype == torch.int64
    assert torch.equal(got.flatten()[got], got)  # what is taken is computed
    own = torch.arange(got.numel()).view(got.shape)
    assert (got != own).any() == (shape[0] * shape[1] > 1 and margin < 9)
    assert torch.equal(create("blank_patches", block=1).origins(pixels), own)


def test_a_deviation_of_the_threshold_is_blank_and_what_is_no_number_is_not():
    pixels = torch.zeros(1, 4, 1, 6)
    pixels[0, 0] = torch.tensor([0.25, -0.25, 0, 0, 0, 0])
    pixels[0, 1] = torch.tensor([0.0, 0.0, 0.3, -0.3, 0, 0])
    pixels[0, 2, 0, 5] = math.nan
    origins = create("blank_patches", threshold=0.25, margin=0, block=8).origins(pixels)
    assert origins.tolist() == [[0, 1, 2, 0]]


def test_a_place_of_another_colour_is_computed():
    pixels = torch.zeros(1, 4, 1, 3)
    pixels[0, 3] = torch.tensor([0.0, 0.0, 0.2])
    origins = create("blank_patches", threshold=0.1, margin=0).origins(pixels)
    assert origins.tolist() == [[1, 1, 1, 3]]


def test_what_is_declared():
    strategy = create("blank_patches", threshold=0.2, block=8)
    assert isinstance(strategy.reuse(TOWER), PixelReuse) and strategy.reuse(TOWER).interval == 1
    assert strategy.acts_between_frames and not strategy.acts_on_projector and not strategy.acts_inside
    assert create("blank_patches", block=1).is_identity and not strategy.is_identity
    assert strategy.counts(video(3).segments) == [8, 8, 8] and strategy.total(video(3).segments) == 24
    assert "budget" not in strategy.info.defaults and strategy.budget_counts() == ""
    assert strategy.describe() == "blank_patches(threshold=0.2, block=8)"
    assert strategy.info.stages == ("pixels",)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(threshold=-0.1), "threshold must be a finite number, at least 0, found -0.1"),
        (dict(threshold=math.nan), "threshold must be a finite number"),
        (dict(threshold=math.inf), "threshold must be a finite number"),
        (dict(margin=-1), "margin and block are numbers of places, at least 0 and 1, found -1 and 4"),
        (dict(block=0), "margin and block are numbers of places, at least 0 and 1, found 1 and 0"),
        (dict(block=2.5), "block must be"),
        (dict(budget=0.25), "blank_patches has no option 'budget': it takes .*threshold.*margin, block"),
    ],
)
def test_bad_options_get_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        create("blank_patches", **options)
    assert len(str(caught.value).splitlines()) == 1


def test_the_budget_is_the_projector_strategys_alone():
    both = combine(["blank_patches", "farcover"], 0.25, blank_patches=dict(threshold=0.2))
    assert both.first.budget == 0.25 and both.info.stages == ("pixels", "projector")
    assert both.describe() == "blank_patches(threshold=0.2) then farcover(budget=0.25), sharing budget=0.25"
    for rival, sentence in (
        ("still_patches", "both act between frames"),
        ("mustdrop", "merges tokens in the vision tower, where blank_patches reuses some of them"),
        ("pvc", "pvc lets frames attend to each other in the vision tower, where blank_patches reuses"),
    ):
        with pytest.raises(ValueError, match=sentence):
            combine(["blank_patches", rival], 0.5)


def test_a_config_makes_the_same_strategy_again():
    made = assemble("blank_patches", None, dict(threshold=0.07, margin=2, block=8))
    config = VTokenConfig.from_dict(VTokenConfig.of(made).to_dict())
    assert assemble(config.strategy, config.budget, dict(config.options)) == made


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_exactly_equal_pixels_are_blank_at_threshold_0(level):
    strategy = create("blank_patches", threshold=0.0, margin=0)
    pixels = torch.full((8, 8, 1, 588), (level / 255 - 0.4815) / 0.2686)
    assert len(strategy.origins(pixels).unique()) == 4
    pixels[3, 3, 0, 5] += 1e-4
    assert len(strategy.origins(pixels).unique()) == 5
