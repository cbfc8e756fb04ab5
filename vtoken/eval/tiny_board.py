"""The board of the tiny LLaVA that ships with the package: a few minutes on a CPU, no download."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .board import BUDGETS, Board, measure, parse_strategy, versions

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
    board_done: Callable[[Board], None] = lambda board: None,
    known: Board | None = None,
    refused: Callable[[str], None] = warnings.warn,
) -> Board:
    """Measure strategies on held-out questions of the tiny LLaVA.

    Args:
        strategies: registered names, or several joined by "+"; all that fit the model if empty.
        budgets: as for `vtoken.patch`. 1.0 is the unpatched model whatever the strategy and is measured once.
        questions: how many, each about a test scene of its own, balanced over the kinds.
        seed: which test scenes.
        batch_size: prompts per `generate` call, ragged, left-padded.
        step: told what is measured and how many questions were just answered.
        board_done: told the board so far after each measured cell.
        known: an earlier board; its cells are taken over if its settings are the same.
        refused: told of each cell that is left out because the strategy cannot serve this model with this budget.

    Raises:
        ValueError: for an unknown strategy or a budget out of range.
    """
    from vtoken import tiny
    from vtoken.tiny.evaluate import answers
    from vtoken.tiny.scenes import held_out

    for name in strategies:
        parse_strategy(name)
    model, processor = tiny.load("llava")
    pairs = held_out(questions, seed)
    asked = [(question.kind, question.answer) for _, question in pairs]

    def say(model: Any, first: int, last: int) -> list[str]:
        return answers(model, processor, pairs[first:last], batch_size)

    settings = {
        "model": "vtoken.tiny llava",
        "weights": weights(model),
        "questions": questions,
        "seed": seed,
        **versions(),
    }
    board = Board(TITLE, settings, [])
    had = {(c.strategy, c.budget): c for c in known.cells} if known and known.settings == settings else {}
    for named, budget in plan(strategies or fitting_strategies(model), budgets):
        cell = had.get((named or "dense", budget))
        if cell is None:
            what = f"{named} at {budget}" if named else "all visual tokens"
            if sentence := refusal(model, named, budget):
                refused(f"{what}: {sentence}")
                step(what, questions)
                continue
            cell = measure(model, asked, say, named, budget, batch_size, functools.partial(step, what))
        else:
            step("taken over", questions)
        board.cells.append(cell)
        board_done(board)
    return board


def refusal(model: Any, strategy: str | None, budget: float | int) -> str:
    """The sentence with which `vtoken.patch` refuses this strategy and budget on this model; empty if it does not."""
    import vtoken

    try:
        with vtoken.applied(model, parse_strategy(strategy or "uniform"), budget=budget):
            return ""
    except ValueError as error:
        return str(error)


def weights(model: Any) -> str:
    """The first digits of a SHA-256 over the model's parameters, which tells boards of different weights apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
