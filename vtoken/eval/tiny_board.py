"""The board of the tiny LLaVA that ships with the package: a few minutes on a CPU, no download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .board import BUDGETS, Board, Cell, measure, versions

TITLE = "Accuracy of the tiny LLaVA against kept visual tokens"


def fitting_strategies(model: Any) -> list[str]:
    """Strategies with published or baseline behaviour that fit `model` and read single images."""
    import vtoken

    names = vtoken.list_strategies(model=model)
    return [n for n in names if "image" in vtoken.strategy_info(n).cls().needs(None).modalities]


def plan(strategies: Sequence[str], budgets: Sequence[float | int]) -> list[tuple[str | None, float | int]]:
    """The cells to measure: all visual tokens once (the same for every strategy), then every strategy at every budget."""
    smaller = [b for b in budgets if isinstance(b, int) or b < 1]
    return [(None, 1.0), *((name, budget) for name in strategies for budget in smaller)]


def tiny_board(
    strategies: Sequence[str] = (),
    budgets: Sequence[float | int] = BUDGETS,
    questions: int = 500,
    seed: int = 0,
    batch_size: int = 50,
    step: Callable[[str, int], None] = lambda what, asked: None,
    cell_done: Callable[[Cell], None] = lambda cell: None,
) -> Board:
    """Measure strategies on held-out questions of the tiny LLaVA.

    Args:
        strategies: registered names; all that fit the model if empty.
        budgets: as for `vtoken.patch`. 1.0 is the unpatched model whatever the strategy and is measured once.
        questions: how many, each about a test scene of its own, balanced over the kinds.
        seed: which test scenes.
        batch_size: prompts per `generate` call, ragged, left-padded.
        step: told what is measured and how many questions were just answered.
        cell_done: told each finished cell.

    Raises:
        ValueError: for an unknown strategy or a budget out of range.
    """
    import vtoken
    from vtoken import tiny
    from vtoken.tiny.evaluate import answers
    from vtoken.tiny.scenes import held_out

    for name in strategies:
        vtoken.strategy_info(name)
    model, processor = tiny.load("llava")
    pairs = held_out(questions, seed)
    asked = [(question.kind, question.answer) for _, question in pairs]

    def say(model: Any, first: int, last: int) -> list[str]:
        return answers(model, processor, pairs[first:last], batch_size)

    cells = []
    for name, budget in plan(strategies or fitting_strategies(model), budgets):
        what = f"{name} at {budget}" if name else "all visual tokens"
        cells.append(measure(model, asked, say, name, budget, batch_size, lambda n, what=what: step(what, n)))
        cell_done(cells[-1])
    settings = {"model": "vtoken.tiny llava", "questions": questions, "seed": seed, **versions()}
    return Board(TITLE, settings, cells)
