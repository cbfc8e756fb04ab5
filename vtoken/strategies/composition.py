"""Several strategies at once, one per stage of a visual token, under one budget."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from ..checks import found
from ..streams import Reuse
from ..tokens import EncoderMerge, EncoderTokens, Needs, PrefillTokens, Segment, Selection, TowerInfo, VisualTokens
from .base import Positions, Strategy, StrategyInfo, check_methods
from .budgets import Budget, check_budget, frames_of
from .registry import create, parse_strategy, split_names

REFERENCE_TOWER = TowerInfo(24, 22, True, tuple(range(24)), 16)  # CLIP-L


@dataclass
class Composite(Strategy):
    """A projector strategy and one that drops inside the LLM, as one strategy; or either beside one that acts between frames.

    How one budget b is shared: the strategy inside the LLM is held to b itself, in its own meaning (what remains behind its
    cut, or its average over the layers), of what the unpatched model would feed. The projector strategy is held to
    `b ** split`, which with the default of one half lets both drop by the same factor. For a whole number b of tokens per
    image or frame of n tokens the projector strategy keeps `n * (b / n) ** split`. Without `budget` every part keeps its own.
    A strategy that only acts between frames, such as stc_cacher, keeps its own budget in any case.

    Args:
        budget: shared by all parts, None to leave theirs as they are.
        parts: configured strategies, at most one for each stage; their order does not matter.
        split: exponent of the projector strategy's share, in [0, 1]; 0 leaves everything to the other, 1 to itself.

    Raises:
        ValueError: for fewer than two parts, two that act at one stage, or parts with different `positions`.
    """

    budget: float | int | None = None  # type: ignore[assignment]
    parts: Sequence[Strategy] = ()
    _: KW_ONLY
    split: float = 0.5
    positions: Positions = field(default="original", init=False)

    def __post_init__(self) -> None:
        if odd := [p for p in self.parts if not isinstance(p, Strategy)]:
            raise TypeError(f"A combination is made of vtoken.strategies objects, found {found(odd[0])}.")
        names = [p.info.name for p in self.parts]
        if len(names) < 2:
            raise ValueError(f"A combination needs at least two strategies, found {', '.join(names) or 'none'}.")
        if len(set(names)) < len(names):
            raise ValueError(f"Each strategy can be there once, found {', '.join(names)}: leave the repetition out.")
        if not 0 <= self.split <= 1:
            raise ValueError(f"split must lie in [0, 1], found {self.split!r}.")
        at_projector = [p for p in self.parts if p.acts_on_projector]
        inside = [p for p in self.parts if p.acts_inside]
        between = [p for p in self.parts if p.acts_between_frames]
        merging = [p for p in self.parts if p.encoder_layers(REFERENCE_TOWER)]
        if between and merging:
            raise ValueError(
                f"{merging[0].info.name} merges tokens in the vision tower, where {between[0].info.name} compares them with "
                "those of an earlier frame: choose one of them."
            )
        places = {"between the tower and the LLM": at_projector, "inside the LLM": inside, "between frames": between}
        for where, rivals in places.items():
            if len(rivals) > 1:
                names_found = " and ".join(p.info.name for p in rivals)
                twice = "mustdrop" in names_found and len(inside) == 1
                off = ", or give mustdrop merging=False and key_rate=0" if twice else ""
                raise ValueError(f"{names_found} both act {where}, where only one can: choose one of them{off}.")
        only = [p for p in between if not p.acts_on_projector and not p.acts_inside]
        both = bool(at_projector and inside) and at_projector[0] is not inside[0]
        if not both and not (only and len(self.parts) == 2):
            raise ValueError(
                f"{' and '.join(names)} do not complement each other: combine a projector strategy such as visionzip with one "
                "that drops inside the LLM such as fastv."
            )
        if len({p.positions for p in self.parts}) > 1:
            found_positions = ", ".join(f"{p.info.name}: {p.positions}" for p in self.parts)
            raise ValueError(f"All strategies of a combination need the same positions, found {found_positions}.")
        self.positions = self.parts[0].positions
        self.first, self.then = (at_projector or only)[0], (inside or only)[0]
        if self.budget is not None:
            self.budget = check_budget(self.budget)
            shared = self.budget**self.split if both and Budget(self.budget).is_share else self.budget
            if self.first not in only:
                self.first = replace(self.first, budget=shared)
            if self.then not in only:
                self.then = replace(self.then, budget=self.budget)
        if hasattr(self.then, "entering") and self.first.budget is not None and self.first.allowance().is_share:
            self.then = copy.copy(self.then)  # the caller's own object stays as it is
            self.then.entering = self.first.budget
        self.ordered = [*(p for p in only if p not in (self.first, self.then)), self.first, self.then]
        self.between = next((p for p in self.ordered if p.acts_between_frames), None)
        self.info = StrategyInfo(  # type: ignore[misc]
            name="+".join(names),
            summary=f"{', then '.join(p.info.name for p in self.ordered)}.",
            stages=tuple(dict.fromkeys(s for p in self.ordered for s in p.info.stages)),
            cls=type(self),
        )

    @property
    def is_identity(self) -> bool:
        return all(p.is_identity for p in self.ordered)

    @property
    def acts_on_projector(self) -> bool:
        return self.first.acts_on_projector

    @property
    def acts_between_frames(self) -> bool:
        return self.between is not None

    def reuse(self, tower: TowerInfo) -> Reuse | None:
        return None if self.between is None or self.between.is_identity else self.between.reuse(tower)

    def needs(self, tower: TowerInfo | None) -> Needs:
        return self.first.needs(tower)

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens per segment that enter the LLM."""
        if budget is not None:
            return Composite(budget, self.parts, split=self.split).counts(segments)
        return self._for(sum(s.fed for s in segments), frames_of(segments)).counts(segments)

    def select(self, tokens: VisualTokens) -> Selection:
        first = self._for(len(tokens), frames_of(tokens.segments))
        return Selection.everything(len(tokens), tokens.cells.device) if first.is_identity else first.select(tokens)

    def _for(self, n: int, frames: int) -> Strategy:
        """The projector strategy with its share of a whole-number budget for an image or video of n tokens."""
        if self.budget is None or self.allowance().is_share or n == 0:
            return self.first
        share = min(1.0, self.allowance().allowed(n, frames) / n) ** self.split
        return replace(self.first, budget=float(share))

    def encoder_layers(self, tower: TowerInfo) -> tuple[int, ...]:
        return () if self.first.is_identity else self.first.encoder_layers(tower)

    def merge_in_encoder(self, tokens: EncoderTokens) -> EncoderMerge | None:
        return self.first.merge_in_encoder(tokens)

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        return () if self.then.is_identity else self.then.prefill_layers(num_layers)

    def aligned_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.then.aligned_layers(num_layers)

    def check_depth(self, num_layers: int) -> None:
        self.then.check_depth(num_layers)

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        return self.then.select_in_prefill(tokens)


def options_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Take the hyper-parameters of one strategy out of `options`. Raises ValueError if they are no mapping of names."""
    given = options.pop(name, {})
    if not isinstance(given, dict) or not all(isinstance(k, str) for k in given):
        raise ValueError(f"Options of {name} are a mapping such as {name}={{'layer': 3}}, found {found(given)}.")
    return given


def combine(parts: Sequence[Any], budget: float | int | None = None, **options: Any) -> Composite:
    """Strategies by name or configured, as one.

    Args:
        parts: names or `Strategy` objects.
        budget: shared by all; see `Composite`. Objects that were configured with their own keep it where this is None.
        options: `split`, `positions` for all that are named, and per name a mapping of its hyper-parameters, such as
            `fastv={"layer": 3}`.

    Raises:
        TypeError, ValueError: for what is no strategy, unknown options, or parts that do not fit together.
    """
    split, positions = options.pop("split", 0.5), options.pop("positions", None)
    made: list[Strategy] = []
    for part in split_names(parts):
        if isinstance(part, type) and issubclass(part, Strategy):
            part = part.info.name
        if isinstance(part, Strategy):
            if budget is not None:
                raise ValueError(
                    f"{part.info.name} is configured already: give each strategy its budget, or name them and let them share."
                )
            made.append(part)
        elif isinstance(part, str):
            given = options_of(part, options)
            made.append(create(part, **({} if positions is None else {"positions": positions}) | given))
        else:
            raise TypeError(f"A combination is made of names and vtoken.strategies objects, found {found(part)}.")
    if options:
        raise ValueError(
            f"A combination takes split, positions and one mapping per strategy, found {', '.join(options)}: "
            f"write for example {made[-1].info.name}={{...}}."
        )
    return Composite(budget, made, split=split)


def assemble(strategy: Any, budget: float | int | None, options: dict[str, Any]) -> Strategy:
    """A Strategy from a name, a class, an instance or a list of them. Raises TypeError for one that has no method to ask."""
    made = _assemble(strategy, budget, options)
    check_methods(type(made))
    return made


def _assemble(strategy: Any, budget: float | int | None, options: dict[str, Any]) -> Strategy:
    if isinstance(strategy, list | tuple) and len(strategy) == 1:
        strategy = strategy[0]
        options = options_of(strategy, options) | options if isinstance(strategy, str) else options
    if isinstance(strategy, str):
        strategy = parse_strategy(strategy)
    if isinstance(strategy, list | tuple):
        return combine(strategy, budget if budget is not None else options.pop("budget", None), **options)
    if isinstance(strategy, Strategy):
        if budget is not None or options:
            given_names = ", ".join(([] if budget is None else ["budget"]) + list(options))
            raise ValueError(
                f"{type(strategy).__name__} is configured already: set {given_names} when you make it, not in patch()."
            )
        return strategy
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        strategy = strategy.info.name
    if not isinstance(strategy, str):
        raise TypeError(
            f"A strategy is a name such as 'hired', a vtoken.strategies object, a list of them or a VTokenConfig, "
            f"found {found(strategy)}."
        )
    if budget is not None:
        options = options | {"budget": budget}
    return create(strategy, **options)
