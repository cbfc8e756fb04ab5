"""Rules for all strategies between tower and LLM: legal answers, determinism, no token invented."""

from __future__ import annotations

import inspect
import statistics
from pathlib import Path

import pytest
import torch

import vtoken
from vtoken.strategies import combine, create, list_names, strategy_info
from vtoken.strategies.budgets import Budget, divide
from vtoken.strategies.info import BUDGET_MEANS
from vtoken.strategies.trained import TrainedStrategy
from vtoken.tokens import Segment

from .common import answer, anyres, build, edge_cases, image, kept_per_segment, tower, video

PROJECTOR = [n for n in list_names() if strategy_info(n).stages == ("projector",)]
IMAGE = [n for n in PROJECTOR if "image" in create(n).needs(None).modalities]
VIDEO = [n for n in PROJECTOR if "video" in create(n).needs(None).modalities]
BUNDLED = [n for n in list_names() if strategy_info(n).cls.__module__.startswith("vtoken.")]
BUDGETS = [0.01, 0.3, 3, 10_000]
EXACT_PER_SEGMENT = ["cdpruner", "coverage", "mmtok", "random", "scope", "stc_pruner", "uniform", "visionzip"]
EXACT_PER_SEGMENT += ["vtc_cls"]


@pytest.mark.parametrize("case", edge_cases())
@pytest.mark.parametrize("name", IMAGE)
def test_legal_and_deterministic_on_odd_images(name, case):
    tokens = edge_cases()[case]
    for budget in BUDGETS:
        strategy = create(name, budget=budget)
        chosen = answer(strategy, tokens)
        assert 1 <= len(chosen.keep) <= len(tokens)
        assert chosen.weight is None or bool(torch.isfinite(chosen.weight).all())
        again = answer(create(name, budget=budget), tokens)
        assert torch.equal(chosen.keep, again.keep)


@pytest.mark.parametrize("name", VIDEO)
@pytest.mark.parametrize(
    "frames,grid,trailing", [(1, (1, 1), 0), (3, (2, 3), 1), (5, (4, 1), 0), (2, (3, 3), 2)]
)
def test_legal_on_videos(name, frames, grid, trailing):
    for dtype in (torch.float32, torch.float16):
        tokens = video(frames, *grid, trailing=trailing, dtype=dtype)
        for budget in BUDGETS:
            chosen = answer(create(name, budget=budget), tokens)
            assert 1 <= len(chosen.keep) <= len(tokens)
            assert torch.isfinite(chosen.dense(len(tokens))).all()


@pytest.mark.parametrize("name", EXACT_PER_SEGMENT)
@pytest.mark.parametrize("budget", BUDGETS)
def test_counts_are_what_is_kept(name, budget):
    strategy = create(name, budget=budget)
    for tokens in (
        image(5, 3),
        anyres(2, 2, 4),
        anyres(2, 1, 4, top=3),
        anyres(1, 3, 3, left=2),
        video(3, 2, 4),
    ):
        assert kept_per_segment(tokens, answer(strategy, tokens)) == strategy.counts(tokens.segments), (
            tokens.segments
        )


@pytest.mark.parametrize("name", PROJECTOR)
def test_one_image_does_not_depend_on_another(name):
    """Strategies see one image at a time; nothing may be remembered from the one before."""
    make = image if "image" in create(name).needs(None).modalities else video
    first, second = make(4, 4, seed=1), make(4, 4, seed=2)
    strategy = create(name, budget=0.4)
    alone = answer(strategy, first).keep
    answer(strategy, second)
    assert torch.equal(answer(strategy, first).keep, alone)


@pytest.mark.parametrize("name", PROJECTOR)
def test_undeclared_modalities_and_options_are_refused(name):
    with pytest.raises(ValueError, match="has no option 'nonsense'"):
        create(name, nonsense=1)
    with pytest.raises(ValueError, match="budget"):
        create(name, budget=0.0)
    assert create(name, budget=1.0).is_identity
    assert set(create(name).needs(tower(False)).modalities) <= {"image", "video"}


def test_divide_is_exact_and_even():
    assert divide(7, [4, 4, 4]) == [3, 2, 2]
    assert divide(7, [1, 9, 1]) == [1, 5, 1]
    assert divide(100, [4, 2]) == [4, 2]
    assert divide(2, [5, 5, 5]) == [1, 1, 0]
    assert divide(0, [3]) == [0]


def test_whole_numbers_count_per_image_and_per_frame():
    crops = list(anyres(2, 2, 4).segments)
    assert (
        sum(Budget(32).tokens(crops)) == 32
        and max(Budget(32).tokens(crops)) - min(Budget(32).tokens(crops)) <= 1
    )
    assert Budget(3).tokens([Segment("frame", (2, 2))] * 3) == [3, 3, 3]
    assert Budget(99).tokens([Segment("image", (2, 2))]) == [4]


def test_shares_are_of_what_is_fed():
    crops = list(anyres(2, 1, 4, top=3).segments)
    assert [s.fed for s in crops] == [16, 4, 4]
    assert Budget(0.5).tokens(crops) == [8, 2, 2]
    assert Budget(0.01).tokens(crops) == [1, 1, 1]
    assert Budget(0.5).tokens(list(anyres(3, 1, 2, top=2).segments)) == [2, 0, 2, 0]


def test_strategies_refuse_what_a_tower_does_not_have():
    with pytest.raises(vtoken.tokens.NotProvided, match="cls_attention"):
        build([Segment("image", (2, 2))], info=tower(False)).cls_attention(17)


def test_a_method_is_one_short_file():
    files = {Path(inspect.getfile(strategy_info(name).cls)) for name in BUNDLED}
    lengths = {path.name: len(path.read_text().splitlines()) for path in files}
    assert len(lengths) == len(BUNDLED) >= 20
    assert not {name: n for name, n in lengths.items() if n > 250}
    trained = {f"{name}.py" for name in BUNDLED if issubclass(strategy_info(name).cls, TrainedStrategy)}
    others = sorted(n for name, n in lengths.items() if name not in trained)
    assert statistics.median(others) <= 85, others


@pytest.mark.parametrize("name", BUNDLED)
def test_classes_are_named_as_their_papers_write_the_method(name):
    """Which leaves no choice but upper and lower case."""
    assert strategy_info(name).cls.__name__.lower() == name.replace("_", "")


def test_names_of_the_last_release_say_how_they_are_written_now():
    with pytest.warns(DeprecationWarning, match="TsLlava is called TSLLaVA"):
        assert vtoken.strategies.TsLlava is strategy_info("ts_llava").cls
    with pytest.raises(AttributeError, match="NotThere"):
        vtoken.strategies.NotThere  # noqa: B018


MEANINGS = {
    "cache": ["decode_evict", "voco"],
    "average": ["flashvid", "mustdrop", "pyramiddrop", "sparsevlm"],
    "cut": ["dart", "fastv", "llavolta"],
    "tower": ["stc_cacher"],
    "attention": ["zipvl"],
    "encoder": ["diffrate", "prune_by_norm", "random_merge", "tempme", "tome"],
}


@pytest.mark.parametrize("name", [n for n in BUNDLED if "budget" in strategy_info(n).defaults])
def test_every_method_tells_what_its_budget_counts(name):
    means = next((m for m, names in MEANINGS.items() if name in names), "entrance")
    info = strategy_info(name)
    assert (
        info.budget_means == means
        and info.budget_counts == create(name).budget_counts() == BUDGET_MEANS[means]
    )


def test_a_combination_tells_it_of_every_part():
    assert combine(["fastv", "random"], 0.25).budget_counts() == (
        "random: visual tokens that enter the LLM; fastv: visual tokens that the LLM reads after the cut"
    )


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (
            dict(stages=("decoder",)),
            "stages of 'wrong' must be .*one of pixels, encoder, projector, prefill, cache, found",
        ),
        (dict(stages=()), "stages of 'wrong' must name one at least"),
        (
            dict(stages=("prefill",), budget_means="all"),
            "budget_means of 'wrong' must be None or one of entrance, .*'all'",
        ),
    ],
)
def test_metadata_that_no_one_knows(metadata, words):
    with pytest.raises(ValueError, match=words):
        vtoken.register("wrong", summary="For tests.", **metadata)(strategy_info("random").cls)
    assert "wrong" not in list_names()
