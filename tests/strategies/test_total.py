"""`Strategy.total` is what `select` keeps, and `Selection.exactly` meets any other number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtoken import Selection
from vtoken.strategies import combine, create, list_names, strategy_info
from vtoken.tokens import Segment

from .common import answer, anyres, image, video

NAMES = [n for n in list_names() if "budget" in strategy_info(n).defaults]
# told for every input that the method serves; the others: None on some
ALWAYS = [
    "cdpruner",
    "coverage",
    "divprune",
    "evs",
    "farcover",
    "flashvid",
    "mmtok",
    "random",
    "scope",
    "stc",
    "stc_pruner",
    "ts_llava",
    "uniform",
    "v_cast",
    "visionzip",
    "vtc_cls",
]
OPTIONS = {"vidcom2": {"exact": True}, "mustdrop": {"merging": False}}

sides = st.integers(1, 6)
images = st.builds(image, sides, sides, seed=st.integers(0, 99))
videos = st.builds(
    video, st.integers(1, 5), sides, sides, trailing=st.integers(0, 2), seed=st.integers(0, 99)
)


@st.composite
def canvases(draw):
    down, across, side = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    top = draw(st.integers(0, (down * side - 1) // 2))
    left = 0 if top else draw(st.integers(0, (across * side - 1) // 2))
    return anyres(down, across, side, top, left, draw(st.booleans()), seed=draw(st.integers(0, 99)))


budgets = st.floats(0.01, 0.99) | st.integers(1, 200)
inputs = st.one_of(images, videos, canvases())


def told(strategy, tokens, budget=None):
    return strategy.total(tokens.segments, int((tokens.cells < 0).sum()), budget)


def serves(strategy, tokens):
    return strategy.acts_on_projector and tokens.modality in strategy.needs(tokens.tower).modalities


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(tokens=inputs, budget=budgets)
def test_total_is_what_is_kept(name, tokens, budget):
    strategy = create(name, budget=budget, **OPTIONS.get(name, {}))
    if serves(strategy, tokens):
        total = told(strategy, tokens)
        assert total is not None or name not in ALWAYS
        if total is not None:
            assert len(answer(strategy, tokens).keep) == total
            assert told(create(name, **OPTIONS.get(name, {})), tokens, budget) == total
    elif not strategy.acts_on_projector:
        assert told(strategy, tokens) == len(tokens)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(tokens=st.one_of(images, videos), budget=budgets)
def test_what_every_frame_keeps(name, tokens, budget):
    strategy, frames = create(name, budget=budget, **OPTIONS.get(name, {})), len(tokens.segments)
    if not serves(strategy, tokens) or bool((tokens.cells < 0).any()):
        return
    counts = strategy.per_segment(tokens.segments)
    assert counts is not None or name not in ALWAYS or frames > 1
    if counts is not None:
        kept = tokens.segment_of[answer(strategy, tokens).keep]
        assert torch.bincount(kept, minlength=frames).tolist() == counts


def test_frames_are_told_where_each_has_its_own_budget():
    segments = [Segment("frame", (6, 6))] * 3
    told = {name: create(name).per_segment(segments, 0.5) for name in ("uniform", "stc_pruner", "visionzip")}
    assert told == dict.fromkeys(told, [18] * 3)
    assert combine(["visionzip", "fastv"], budget=0.25).per_segment(segments) == [18] * 3
    assert combine(["divprune", "fastv"], budget=0.25).per_segment(segments) is None
    assert (
        create("divprune").per_segment(segments) is None and create("vidcom2").per_segment(segments) is None
    )
    assert create("divprune").per_segment(segments[:1], 0.5) == [18]
    assert create("divprune").per_segment(segments, 1.0) == [36] * 3


@settings(max_examples=40, deadline=None)
@given(tokens=inputs, budget=budgets)
def test_total_of_a_combination(tokens, budget):
    strategy = combine(["visionzip", "fastv"], budget=budget)
    assert len(answer(strategy, tokens).keep) == told(strategy, tokens)


@pytest.mark.parametrize("name", NAMES)
def test_total_of_everything(name):
    strategy = create(name)
    for tokens in (image(), anyres(2, 2, 4, top=2), video(3, 2, 2)):
        assert told(strategy, tokens, 1.0) in (len(tokens), None)


def test_total_is_not_told_where_the_picture_decides():
    crops, plain = anyres(2, 2, 4), image()
    for name in ("hired", "globalcom2", "token_corr"):
        assert told(create(name), crops) is None
    for name in ("hired", "globalcom2"):
        assert told(create(name, budget=0.2), plain) == 3
    assert told(create("vidcom2"), video()) is None and told(create("mustdrop"), plain) is None
    assert create("uniform").total([Segment("image", (10, 10))], 7) == 20
    assert create("vtc_cls").total([Segment("image", (10, 10))], 7) == 27
    assert create("divprune").total([Segment("image", (10, 10))], 10) == 22
    with pytest.raises(ValueError, match="budget"):
        create("uniform").total([Segment("image", (10, 10))], budget=0.0)


@pytest.mark.parametrize("name", ["hired", "globalcom2", "vtc_cls", "visionzip"])
def test_any_number_can_be_met(name):
    tokens = anyres(2, 2, 4)
    chosen, n = answer(create(name, budget=0.3), tokens), len(tokens)
    for count in range(n + 1):
        made = chosen.exactly(count, n).check(n)
        assert len(made.keep) == count
        fewer, more = sorted((set(made.keep.tolist()), set(chosen.keep.tolist())), key=len)
        assert fewer <= more
        assert torch.isfinite(made.dense(n)).all()


def test_exactly_goes_by_score():
    scores = torch.tensor([5.0, 1, 4, 2, 3])
    chosen = Selection(torch.tensor([1, 2, 3]), scores=scores)
    assert chosen.exactly(2, 5).keep.tolist() == [2, 3]
    assert chosen.exactly(4, 5).keep.tolist() == [0, 1, 2, 3]
    assert Selection(torch.tensor([1, 3])).exactly(1, 5).keep.tolist() == [1]
    assert Selection(torch.tensor([1, 3])).exactly(3, 5).keep.tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match=r"0\.\.5, found 6"):
        chosen.exactly(6, 5)
    with pytest.raises(ValueError, match="tokens of its own"):
        Selection(torch.tensor([0]), features=torch.ones(1, 2)).exactly(2, 5)


def test_exactly_in_parts():
    chosen = Selection(torch.tensor([0, 1, 2]), scores=torch.tensor([5.0, 1, 4, 2, 3, 6]))
    part = torch.tensor([0, 0, 0, 1, 1, 1])
    assert chosen.exactly([3, 0], 6, part) is chosen
    assert chosen.exactly([2, 1], 6, part).keep.tolist() == [0, 2, 5]
    assert chosen.exactly([0, 2], 6, part).keep.tolist() == [4, 5]
    with pytest.raises(ValueError, match=r"in 0\.\.3, found 4"):
        chosen.exactly([4, 0], 6, part)


def test_exactly_of_groups():
    owner = torch.tensor([0, 0, 2, 2, -1])
    chosen = Selection.merge(torch.tensor([0, 2]), owner)
    chosen.scores = torch.tensor([1.0, 0, 2, 0, 3])
    assert chosen.exactly(1, 5).dense(5).tolist() == [[0, 0, 0.5, 0.5, 0]]
    assert chosen.exactly(3, 5).dense(5).tolist() == [
        [0.5, 0.5, 0, 0, 0],
        [0, 0, 0.5, 0.5, 0],
        [0, 0, 0, 0, 1],
    ]
    # a token that leaves its group keeps its own value and takes its share along
    assert chosen.exactly(4, 5).dense(5)[:2].tolist() == [[0.5, 0, 0, 0, 0], [0, 1, 0, 0, 0]]


@pytest.mark.parametrize("name", NAMES)
def test_methods_that_rank_give_their_scores(name):
    from vtoken.strategies.scored import ScoredStrategy

    if not issubclass(strategy_info(name).cls, ScoredStrategy):
        return
    strategy = create(name, budget=0.5)
    images = "image" in strategy.needs(None).modalities
    tokens = image() if images else video()
    chosen = answer(strategy, tokens)
    left = torch.ones(len(tokens), dtype=torch.bool).index_fill_(0, chosen.keep, False)
    if images:
        assert chosen.scores[chosen.keep].min() >= chosen.scores[left].max()
    assert chosen.scores.shape == (len(tokens),)
