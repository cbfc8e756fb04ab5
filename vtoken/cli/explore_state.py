"""The state of the page of `vtoken demo explore`: one model, its answers, and the latest of them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from .. import answer, list_strategies, report
from ..asking import ask, prepare
from ..drawing import visualize
from ..patching import applied
from ..strategies.registry import modalities_of, parse_strategy, strategy_info
from ..strategies.trained import TrainedStrategy
from .compare import USUAL
from .demo import tower_pictures
from .explore_inputs import Subject, of_a_visitor
from .options import failure
from .page_visitors import MAX_QUESTION

CACHED = 64  # answers that are kept with their tokens
NEW_TOKENS = 32
MAX_NAME = 100  # characters of a strategy's name that a visitor types
SIDE, WIDE = 480, 800  # px of the longer side of a drawn picture or row of frames, and of a canvas of crops


@dataclass(frozen=True)
class Outcome:
    """One answer, or why there is none.

    Attributes:
        strategy: as the page names it, "" for all visual tokens.
        said: the answer.
        seconds: time of `generate`.
        report: None without a strategy.
        seen: the pictures that the vision tower read, or the original one.
        refused: one sentence in place of all that.
    """

    strategy: str
    said: str = ""
    seconds: float = 0.0
    report: Any = None
    seen: Any = None
    refused: str = ""

    def pictures(self, everything: bool = False) -> list[Image.Image]:
        """The kept tokens, or all of them, drawn on the picture; of a clip on several rows of frames."""
        if self.report is None:
            return []
        visual = self.report.visuals[0]
        if everything:
            visual = replace(visual, keep=torch.arange(visual.tokens_in), layers=())
        return sheets(self.seen, visual)


class Recent:
    """The latest outcomes, `most` of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._known: OrderedDict[tuple[Any, ...], Outcome] = OrderedDict()
        self._asked: list[Subject] = []  # of answers that are being made, without those forgotten meanwhile
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: tuple[Any, ...], make: Callable[[], Outcome]) -> Outcome:
        """What is known under a key, else what `make` makes; a refusal is not kept."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
            self._asked.append(key[0])
        try:
            outcome = make()
        finally:
            with self._lock:
                wanted = key[0] in self._asked
                if wanted:
                    self._asked.remove(key[0])
        if wanted and not outcome.refused:
            with self._lock:
                self._known[key] = outcome
                while len(self._known) > self.most:
                    self._known.popitem(last=False)
        return outcome

    def forget(self, subject: Subject) -> None:
        """Drop what is known about a subject."""
        with self._lock:
            self._asked = [each for each in self._asked if each is not subject]
            for key in [key for key in self._known if key[0] is subject]:
                del self._known[key]


class Explorer:
    """Asks one model about pictures and clips, with all visual tokens and with fewer.

    Args:
        model, processor: one call at a time, whatever number of threads ask.
        more: strategies to offer besides those that fit, such as "visionzip+fastv".
        tiny: whether the model is a tiny one, whose times say nothing.
        most: outcomes that are kept.
    """

    def __init__(
        self, model: Any, processor: Any, more: Sequence[str] = (), tiny: bool = False, most: int = CACHED
    ) -> None:
        self.model, self.processor, self.tiny = model, processor, tiny
        self.recent, self._turn = Recent(most), threading.Lock()
        fit = [
            name
            for name in list_strategies(model=model)
            if not issubclass(strategy_info(name).cls, TrainedStrategy)  # whose weights would be new
        ]
        self._fit = [*dict.fromkeys([*more, *fit])]

    def check(self, names: Sequence[str], kind: str) -> None:
        """Raise ValueError for a strategy that does not fit the model, or is not defined for this kind."""
        for name in names:
            with applied(self.model, parse_strategy(name), budget=_middle(name)):
                pass
            if refused := self.refusal(name, kind):
                raise ValueError(refused)

    def strategies(self, kind: str) -> list[str]:
        """Those to choose from for an "image" or a "video"."""
        return [name for name in self._fit if all(kind in modalities_of(part) for part in _parts(name))]

    def two(self, kind: str, wanted: Sequence[str] = ()) -> tuple[str, str]:
        """Two different strategies for an "image" or a "video", the wanted ones if they fit."""
        offered = self.strategies(kind)
        asked = [name for name in map(tidy, wanted) if not self.refusal(name, kind)]
        usual = [name for name in ["farcover", "fastv", *USUAL, *offered] if name in offered]
        chosen = [*dict.fromkeys([*asked, *usual])]
        return chosen[0], chosen[min(1, len(chosen) - 1)]

    def refusal(self, name: str, kind: str) -> str:
        """Why the page does not ask under a strategy, as one sentence; "" where it does.

        Args:
            name: of one strategy or of several that are joined by "+", as a visitor typed it.
            kind: "image" or "video".
        """
        if not name:
            return "Choose a strategy first."
        try:
            for part in _parts(name):
                if issubclass(strategy_info(part).cls, TrainedStrategy):
                    return f"{part} needs trained weights, which this page does not load: choose another."
                if kind not in modalities_of(part):
                    offered = ", ".join(self.strategies(kind))
                    return f"{part} is not defined for {kind} input: use {offered}."
            if name not in self._fit:
                if "(" in name:
                    return "A strategy gets its options when the page is started: choose one from the list."
                with self._turn, applied(self.model, parse_strategy(name), budget=_middle(name)):
                    pass
        except (ValueError, NotImplementedError) as error:
            return " ".join(str(error).split())
        return ""

    def everything(self, subject: Subject, question: str) -> Outcome:
        """The answer with all visual tokens."""
        question = _cut(question)
        return self.recent.get((subject, question), lambda: self._asked(subject, question, "", None))

    def outcome(self, subject: Subject, question: str, strategy: str, budget: float) -> Outcome:
        """The answer under a strategy with a share of the visual tokens; refusals are outcomes too."""
        question = _cut(question)
        strategy = tidy(strategy)
        refused = self.refusal(strategy, subject.kind)
        if refused:
            return Outcome(strategy, refused=refused)
        if not 0 < budget <= 1:
            return Outcome(strategy, refused="The budget is a share above 0, of 1 at most.")
        share = float(budget) if _takes_budget(strategy) else None  # a browser sends 1.0 as 1, one token
        key = (subject, question, strategy, share)
        return self.recent.get(key, lambda: self._asked(subject, question, strategy, share))

    def forget(self, subject: Subject) -> None:
        """Drop the answers about a subject."""
        self.recent.forget(subject)

    def read(self, path: Any, question: str) -> Subject:
        """An uploaded file, which is then deleted. Raises ValueError with one sentence."""
        try:
            return of_a_visitor(path, question, self.processor)
        finally:
            path.unlink(missing_ok=True)

    def _asked(self, subject: Subject, question: str, strategy: str, budget: float | None) -> Outcome:
        if not question:
            return Outcome(strategy, refused="Ask a question first.")
        try:
            with self._turn:
                patch = applied(self.model, parse_strategy(strategy), budget=budget) if strategy else None
                with patch or nullcontext():
                    return self._answer(subject, question, strategy)
        except Exception as error:
            told = failure(error)
            if told is None:
                logging.getLogger(__name__).exception("%s on %s", strategy or "all tokens", subject.kind)
            words = f"The model failed ({type(error).__name__})." if told is None else told.message
            return Outcome(strategy, refused=words)

    def _answer(self, subject: Subject, question: str, strategy: str) -> Outcome:
        if isinstance(subject.media, Image.Image):
            inputs = prepare(self.model, self.processor, subject.media, question)
            said, seconds = ask(self.model, self.processor, inputs, NEW_TOKENS)
            told = report(self.model) if strategy else None
            return Outcome(
                strategy, said, seconds, told, tower_pictures(subject.media, inputs, self.processor)
            )
        start = time.perf_counter()
        got = answer(self.model, self.processor, subject.media, question, max_new_tokens=NEW_TOKENS)
        seconds = time.perf_counter() - start - got.seconds["read"] - got.seconds["process"]
        return Outcome(strategy, got.text, seconds, got.report, subject.frames)


def sheets(seen: Any, visual: Any) -> list[Image.Image]:
    """The pictures of an image's tokens, or of a clip's, whose frames come in rows of a square."""
    segments = visual.segments
    if segments[-1].kind != "frame":
        crops = 1 + max(max(segment.place) for segment in segments)
        return [visualize(seen, visual, cell=_cell(segments[-1].grid, SIDE if crops == 1 else WIDE // crops))]
    frames = [seen[i * len(seen) // len(segments)] for i in range(len(segments))]  # a step may hold two
    columns, drawn, low = math.ceil(math.sqrt(len(segments))), [], 0
    for first in range(0, len(segments), columns):
        row = segments[first : first + columns]
        high = low + sum(s.grid[0] * s.grid[1] for s in row)
        cells = torch.where((visual.cells >= low) & (visual.cells < high), visual.cells - low, -1)
        cell = _cell(row[0].grid, SIDE // columns)
        part = replace(visual, segments=row, cells=cells)
        drawn.append(visualize(frames[first : first + columns], part, cell=cell))
        low = high
    return drawn


def _cell(grid: tuple[int, int], side: int) -> int:
    return max(4, side // max(grid))


def _parts(name: str) -> list[str]:
    parsed = parse_strategy(name)
    return [parsed] if isinstance(parsed, str) else parsed


def tidy(name: Any) -> str:
    """A name as a browser sends it, without spaces around its parts, cut to `MAX_NAME` characters."""
    return "+".join(part.strip() for part in str(name or "").split("+"))[:MAX_NAME]


def _takes_budget(name: str) -> bool:
    return any(strategy_info(part).cls.takes_budget() for part in _parts(name))


def _middle(name: str) -> float | None:
    """A budget to try whether a strategy fits a model, None where it takes none."""
    return 0.5 if _takes_budget(name) else None


def _cut(question: str) -> str:
    return str(question).strip()[:MAX_QUESTION]
