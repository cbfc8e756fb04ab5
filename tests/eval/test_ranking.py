"""The order of strategies over several boards."""

from __future__ import annotations

import pytest

from vtoken.eval.board.board import Board, Cell
from vtoken.eval.board.page import summary, tables
from vtoken.eval.board.ranking import ranked, ranking, ranks


def cell(strategy: str, budget: float | int, right: int, tokens: float, baseline: bool = False) -> Cell:
    return Cell(strategy, budget, baseline, tokens, 100.0, 0.5, right, 100, {"count": (right, 100)}, 1.0)


def board(medium: str, *cells: Cell) -> Board:
    return Board(f"Tiny, {medium}s", dict(medium=medium), [cell("dense", 1.0, 100, 100.0), *cells])


BOARDS = [
    board(
        "image",
        cell("a", 0.2, 90, 20.0),
        cell("b", 0.2, 90, 21.9),
        cell("c", 0.2, 95, 60.0),  # reads three times the budget
        cell("r", 0.2, 50, 20.0, baseline=True),
        cell("a", 0.1, 60, 10.0),
        cell("r", 0.1, 61, 10.0, baseline=True),
    ),
    board("video", cell("b", 0.2, 80, 20.0), cell("r", 0.2, 85, 20.0, baseline=True), cell("b", 4, 7, 4.0)),
]


def test_ranks_share_the_mean_among_equals():
    assert ranks([3.0, 5.0, 5.0, 1.0]) == [3.0, 1.5, 1.5, 4.0]
    assert ranks([]) == []


def test_the_order_over_all_boards_and_budgets():
    order = {p.name: p for p in ranked(BOARDS)}
    assert list(order) == ["b", "r", "a", "c"]
    assert order["a"].ranks == {"image": [1.5, 2.0]}
    assert order["b"].ranks == {"image": [1.5], "video": [2.0, 1.0]}
    assert order["r"].mean() == pytest.approx((3 + 1 + 1) / 3) and order["r"].mean("image") == 2.0
    assert order["c"].mean() is None and order["c"].count == 0


def test_the_table_and_its_place_on_the_page():
    lines = ranking(BOARDS)
    assert lines[0] == "| strategy | images | videos | all | cells |"
    assert "| *r* | 2.0 | 1.0 | 1.7 | 3 |" in lines and lines[-1] == "| c |  |  |  | 0 |"
    page = summary(BOARDS, "vtoken eval tiny", ["a.png", "b.png"])
    assert page.index("Mean rank") < page.index("(a.png)") < page.index("(b.png)") and lines[3] in page
    assert "Mean rank" not in summary(BOARDS[:1], "vtoken eval tiny", ["a.png"])
    assert "### Tiny, images" in tables(BOARDS)
