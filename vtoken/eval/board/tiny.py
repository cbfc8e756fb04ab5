"""Boards of the tiny models that ship with the package: minutes on a CPU, no download."""

from __future__ import annotations

import functools
import hashlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...naming import split_options
from ...strategies.registry import parse_strategy
from .board import BUDGETS, LOWER, Batch, Board, Cell, key, measure, versions
from .tower_memo import TowerMemo

LARGEST = 0.5  # a method that cannot reach this budget on a model does not fit it


@dataclass
class Subject:
    """A tiny model with questions about one medium; work shared by all cells is done once.

    Attributes:
        name: of the tiny model.
        medium: "image" or "video".
        only: whether the model is asked about no other medium.
    """

    name: str
    medium: str
    only: bool
    model: Any
    batches: list[Batch]

    @property
    def budgets(self) -> tuple[float | int, ...]:
        """Budgets that tell strategies apart on this model."""
        from ...tiny.questions import HARDER

        return LOWER if self.name in HARDER else BUDGETS

    @property
    def stem(self) -> str:
        """Stem of the subject's file names."""
        return self.name if self.only else f"{self.name}_{self.medium}"

    def settings(self, seed: int) -> dict[str, Any]:
        """What the answers depend on."""
        questions = sum(len(batch.asked) for batch in self.batches)
        of = {"model": self.name, "medium": self.medium, "weights": weights(self.model)}
        return {**of, "questions": questions, "seed": seed, **versions()}

    def given(self, name: str | None) -> Any:
        """What `vtoken.patch` is given for a strategy: its name, or the weights that ship for this model."""
        from ... import tiny
        from ...config import VTokenConfig

        plain, options = split_options(name or "")
        folder = tiny.trained(self.name).get(plain)
        if folder is None:
            return name
        config = VTokenConfig.from_pretrained(folder)
        return replace(config, options=config.options | options)

    def fitting(self) -> list[str]:
        """Strategies that fit the model at budget 0.5 and the medium; for images none about frames.

        Those with weights are among them if some ship for this model.
        """
        import vtoken

        from ... import tiny
        from ...strategies.trained import trained_names

        known = vtoken.list_strategies()
        lacking = set(trained_names()) - tiny.trained(self.name).keys()
        names = [n for n in known if n not in lacking and not refusal(self.model, self.given(n), LARGEST)]
        made = {name: vtoken.strategy_info(name).cls() for name in names}
        if self.medium == "image":
            made = {name: strategy for name, strategy in made.items() if not strategy.acts_between_frames}
        return [name for name, strategy in made.items() if self.medium in strategy.needs(None).modalities]


def subjects(name: str, questions: int = 500, seed: int = 0, batch_size: int = 50) -> list[Subject]:
    """A tiny model with held-out questions, one subject per medium that its recipe asks about.

    Args:
        name: one of `vtoken.tiny.names()`.
        questions: how many of all media together, each about a test example of its own.
        seed: which test examples.
        batch_size: prompts per `generate` call, ragged, left-padded; clips with clips of as many frames.

    Raises:
        ValueError: for an unknown model.
    """
    from vtoken import tiny
    from vtoken.tiny.questions import held_out

    model, processor = tiny.load(name)
    pairs = held_out(name, questions, seed)
    groups: dict[tuple[str, int], list[Any]] = {}
    for example, question in pairs:
        frames = len(example.media) if isinstance(example.media, list) else 0
        groups.setdefault(("video" if frames else "image", frames), []).append((example, question))
    media = sorted({medium for medium, _ in groups})
    out, memo, number = [], TowerMemo(model), itertools.count()
    for medium in media:
        batches = [
            _batch(processor, some[first : first + batch_size], memo, next(number))
            for (of, _), some in sorted(groups.items())
            if of == medium
            for first in range(0, len(some), batch_size)
        ]
        out.append(Subject(name, medium, len(media) == 1, model, batches))
    return out


def _batch(processor: Any, pairs: Sequence[Any], memo: TowerMemo, number: int) -> Batch:
    from vtoken.tiny.questions import prepare

    inputs = prepare(processor, pairs)
    asked = [(question.kind, question.answer) for _, question in pairs]
    # one word and an end more than any answer has: a longer text is wrong whatever follows
    longest = max(
        len(ids) for ids in processor.tokenizer([a for _, a in asked], add_special_tokens=False).input_ids
    )

    @torch.no_grad()
    def say(model: Any) -> list[str]:
        with memo.reading(number):
            out = model.generate(**inputs, max_new_tokens=longest + 1, do_sample=False)
        out = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]

    return Batch(asked, say)


def plan(strategies: Sequence[str], budgets: Sequence[float | int]) -> list[tuple[str | None, float | int]]:
    """The cells to measure: all visual tokens once, then every strategy at every budget."""
    smaller = [b for b in budgets if isinstance(b, int) or b < 1]
    return [(None, 1.0), *dict.fromkeys((name, budget) for name in strategies for budget in smaller)]


def tiny_board(
    subject: Subject,
    strategies: Sequence[str] = (),
    budgets: Sequence[float | int] = (),
    seed: int = 0,
    step: Callable[[str, int], None] = lambda what, asked: None,
    cell_done: Callable[[Board, Cell], None] = lambda board, cell: None,
    known: Board | None = None,
    refused: Callable[[str], None] = warnings.warn,
) -> Board:
    """Measure strategies on the held-out questions of one subject.

    Args:
        subject: see `subjects`.
        strategies: registered names, or several joined by "+"; all that fit the subject if empty.
        budgets: as for `vtoken.patch`; the subject's own if empty. 1.0 is the unpatched model whatever the
            strategy and is measured once.
        seed: of the subject's questions, to be written down.
        step: called with the name of the current cell and the number of questions just answered.
        cell_done: called with the board so far and the new cell.
        known: an earlier board; its cells are taken over if its settings are the same.
        refused: called for each cell that is left out because the strategy cannot serve this model with this
            budget.

    Raises:
        ValueError: for an unknown strategy or a budget out of range.
    """
    for name in strategies:
        parse_strategy(name)
    settings = subject.settings(seed)
    questions = settings["questions"]
    board = Board(f"Tiny {subject.name}, {subject.medium}s", settings, [])
    wanted = plan(strategies or subject.fitting(), budgets or subject.budgets)
    keys = [key(named or "dense", budget) for named, budget in wanted]
    done = {at: known.at[at] for at in keys if at in known.at} if known and known.settings == settings else {}
    board.cells = [done[at] for at in keys if at in done]
    for (named, budget), place in zip(wanted, keys, strict=True):
        if place in done:
            step("taken over", questions)
            continue
        what = f"{named} at {budget}" if named else "all visual tokens"
        given = subject.given(named)
        if sentence := refusal(subject.model, given, budget):
            refused(f"{what}: {sentence}")
            step(what, questions)
            continue
        try:
            done[place] = measure(
                subject.model, subject.batches, named, budget, functools.partial(step, what), given
            )
        except ValueError as error:  # an input that the strategy refuses
            refused(f"{what}: {error}")
            continue
        board.cells = [done[at] for at in keys if at in done]
        cell_done(board, done[place])
    return board


def refusal(model: Any, strategy: Any, budget: float | int) -> str:
    """The sentence with which `vtoken.patch` refuses strategy and budget on this model; empty if it fits."""
    import vtoken

    try:
        with vtoken.applied(model, strategy or "uniform", budget=budget):
            return ""
    except ValueError as error:
        return str(error)


def weights(model: Any) -> str:
    """The first digits of a SHA-256 over the model's parameters, to tell boards of other weights apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
