"""A slice of the board of every tiny model: farcover and chance at one small budget."""

from __future__ import annotations

import pytest

from vtoken import tiny
from vtoken.eval.board.tiny import subjects, tiny_board
from vtoken.tiny.questions import HARDER

QUESTIONS = 16


@pytest.mark.parametrize("name", tiny.names())
def test_farcover_answers_more_than_chance_at_equal_tokens(name):
    budget = 0.05 if name in HARDER else 0.1
    for subject in subjects(name, QUESTIONS, 5, 12):
        board = tiny_board(subject, ["farcover", "random"], [budget])
        dense, chosen, _ = board.cells
        assert dense.accuracy >= 0.8
        assert chosen.tokens < 0.15 * dense.tokens
        assert chosen.accuracy > board.chance(chosen.tokens), board.cells
