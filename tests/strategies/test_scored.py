"""`ScoredStrategy`: what is done for a method that writes scores alone."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import pytest
import torch

from vtoken import Segment, VisualTokens
from vtoken.strategies import ScoredStrategy

from .common import answer, anyres, build, edge_cases, kept_per_segment, separators_kept, top, video


@dataclass
class Longest(ScoredStrategy):
    """The tokens with the largest squared length."""

    def scores(self, tokens):
        return tokens.by_cell(tokens.features.float().square().sum(-1))


@dataclass
class Told(ScoredStrategy):
    """A cell is worth its number; of segment i stay i."""

    static_counts = False
    _: KW_ONLY
    keep_newline: bool = True

    def scores(self, tokens):
        count = len(tokens.segments)
        return torch.arange(tokens.num_cells).view(count, -1).double(), range(count)


class Divided(ScoredStrategy):
    """Nothing over nothing in the last cell."""

    def scores(self, tokens):
        found = tokens.by_cell(tokens.features.float().square().sum(-1))
        found[-1, -1] *= torch.inf - torch.inf
        return found


def test_scores_that_are_no_numbers_are_refused():
    tokens = edge_cases()["tall"]
    with pytest.raises(ValueError, match="scores of Divided must be numbers, found nan for 1 of 18 tokens"):
        Divided(budget=0.5).select(tokens)


class Wrong(ScoredStrategy):
    def scores(self, tokens):
        return torch.zeros(len(tokens))


@pytest.mark.parametrize("case", edge_cases())
@pytest.mark.parametrize("budget", [0.3, 7])
def test_the_best_of_every_segment_by_brute_force(case, budget):
    tokens, made = edge_cases()[case], Longest(budget)
    worth = tokens.features.float().square().sum(-1)
    want = []
    for i, count in enumerate(made.counts(tokens.segments)):
        mine = (tokens.segment_of == i).nonzero()[:, 0]
        mine = mine[tokens.cells[mine].argsort()]
        want += mine[top(worth[mine], count)].tolist()
    assert answer(made, tokens).keep.tolist() == sorted(want)


def test_the_picture_may_decide_how_many_and_separators_stay_on_request():
    tokens = anyres(2, 2, 4, top=1)
    chosen = answer(Told(0.5), tokens)
    assert kept_per_segment(tokens, chosen) == [0, 1, 2, 3, 4]
    assert separators_kept(tokens, chosen) == len(tokens.separator_rows) > 0
    assert separators_kept(tokens, answer(Told(0.5, keep_newline=False), tokens)) == 0
    assert separators_kept(tokens, answer(Longest(0.5), tokens)) == 0


def test_segments_of_several_sizes():
    plain = build([Segment("image", (2, 3))])
    cells = torch.arange(6 + 2)
    tokens = VisualTokens(torch.rand(8, 4), (*plain.segments, Segment("image", (1, 2))), cells)
    assert tokens.by_cell(torch.arange(8.0)).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, *[-torch.inf] * 4]]
    assert kept_per_segment(tokens, Longest(0.5).select(tokens)) == [3, 1]


def test_by_cell_leaves_cells_without_a_token_at_minus_infinity():
    tokens = anyres(2, 1, 4, top=3)
    grid = tokens.by_cell(torch.arange(len(tokens), dtype=torch.float64))
    assert grid.dtype == torch.float64 and torch.equal(grid.isfinite().flatten(), tokens.fed_cells)
    fed = tokens.patch_rows
    assert grid.flatten()[tokens.cells[fed]].tolist() == fed.tolist()


def test_scores_of_another_shape_are_refused_with_what_would_do():
    with pytest.raises(ValueError, match=r"Wrong must give \(3, 8\).*found \(25,\): tokens.by_cell"):
        Wrong(0.5).select(video(3, 2, 4, trailing=1))
    with pytest.raises(NotImplementedError, match="must write scores"):
        ScoredStrategy(0.5).select(video())


def test_an_option_of_the_base_takes_no_place_from_those_of_a_method():
    @dataclass
    class Own(Longest):
        rank: int = 3

    assert Own(0.5, 7).rank == 7 and not Own(0.5, 7).keep_newline
