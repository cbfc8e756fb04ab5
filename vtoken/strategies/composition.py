"""Several strategies at once, one per stage of a visual token, under one budget."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from ..checks import found
from ..selection import EncoderMerge, Selection
from ..sparse_attention import AttentionTokens, SparseAttention
from ..storage import Storage
from ..streams import PixelReuse, Reuse
from ..temporal import Temporal
from ..tokens import EncoderTokens, Needs, PrefillTokens, Segment, TowerInfo, VisualTokens
from .base import Positions, Strategy
from .budgets import Budget, frames_of
from .info import StrategyInfo
from .merging import EncoderStrategy

REFERENCE_TOWER = TowerInfo(24, 22, True, tuple(range(24)), 16)  # CLIP-L


@dataclass
class Composite(Strategy):
    """Combination of a projector strategy and one that drops inside the LLM, as one strategy.

    Either of the two may also be combined with a strategy that reuses tokens inside the vision tower, and
    with one that acts on the KV cache or attends to tokens of its own choice.

    How one budget b is shared: the strategy inside the LLM is held to b itself, in its own meaning (what
    remains after its cut, or its average over the layers), of what the unpatched model would feed. The
    projector strategy is held to `b ** split`, which with the default of one half lets both drop by the same
    factor. For a whole number b of tokens per image or frame of n tokens the projector strategy keeps `n * (b
    / n) ** split`. Without `budget` every part keeps its own. A strategy that only reuses in the tower, acts
    in attention or acts on the KV cache keeps its own budget in any case, if it has one.

    Args:
        budget: shared by all parts, None to leave theirs as they are.
        parts: configured strategies, at most one for each stage; their order does not matter.
        split: exponent of the projector strategy's share, in [0, 1]; 0 leaves everything to the other, 1 to
            itself.

    Raises:
        ValueError: for fewer than two parts, two that act at one stage or exclude each
            other in the vision tower, or parts with different `positions`.
    """

    budget: float | int | None = None  # type: ignore[assignment]
    parts: Sequence[Strategy] = ()
    _: KW_ONLY
    split: float = 0.5
    positions: Positions = field(default="original", init=False)

    def __post_init__(self) -> None:
        self._check_parts()
        at_projector, inside, between, stored = self._places()
        only = [p for p in (*between, *stored) if not p.acts_on_projector and not p.acts_inside]
        both = bool(at_projector and inside) and at_projector[0] is not inside[0]
        if not both and not only:
            raise ValueError(
                f"{' and '.join(p.info.name for p in self.parts)} do not complement each other: combine a"
                " projector strategy such as visionzip with one that drops inside the LLM such as fastv."
            )
        self.positions = self.parts[0].positions
        self.first, self.then = (at_projector or only)[0], (inside or only)[0]
        if self.budget is not None:
            shared = self.budget**self.split if both and self.allowance().is_share else self.budget
            if self.first not in only:
                self.first = self.first.with_budget(shared)
            if self.then not in only:
                self.then = self.then.with_budget(self.budget)
        self.entering = self.first.budget if both and isinstance(self.first.budget, float) else 1.0
        later = [self.first] if self.first is self.then else [self.first, self.then]
        before = [p for p in only if p in between]
        self.ordered = [*before, *(p for p in later if p not in only), *(p for p in only if p not in before)]
        self.between = next((p for p in self.ordered if p.acts_between_frames), None)
        self.stored = next((p for p in self.ordered if p.acts_on_cache or p.acts_in_attention), None)
        self.info = StrategyInfo(  # type: ignore[misc]
            name="+".join(p.info.name for p in self.parts),
            summary=f"{', then '.join(p.info.name for p in self.ordered)}.",
            stages=tuple(dict.fromkeys(s for p in self.ordered for s in p.info.stages)),
            cls=type(self),
        )

    def _check_parts(self) -> None:
        """Raise TypeError or ValueError for parts that make no combination, wherever they act."""
        if odd := [p for p in self.parts if not isinstance(p, Strategy)]:
            raise TypeError(f"A combination is made of vtoken.strategies objects, found {found(odd[0])}.")
        names = [p.info.name for p in self.parts]
        if len(names) < 2:
            raise ValueError(
                f"A combination needs at least two strategies, found {', '.join(names) or 'none'}."
            )
        if len(set(names)) < len(names):
            raise ValueError(
                f"Each strategy can be there once, found {', '.join(names)}: leave the repetition out."
            )
        if not 0 <= self.split <= 1:
            raise ValueError(f"split must lie in [0, 1], found {self.split!r}.")
        if len({p.positions for p in self.parts}) > 1:
            each = ", ".join(f"{p.info.name}: {p.positions}" for p in self.parts)
            raise ValueError(f"All strategies of a combination need the same positions, found {each}.")

    def _places(self) -> tuple[list[Strategy], list[Strategy], list[Strategy], list[Strategy]]:
        """Parts that act before the LLM, inside it, between frames and on the cache.

        Raises ValueError for two at one place.
        """
        at_projector = [p for p in self.parts if p.acts_on_projector]
        inside = [p for p in self.parts if p.acts_inside]
        between = [p for p in self.parts if p.acts_between_frames]
        stored = [p for p in self.parts if p.acts_on_cache or p.acts_in_attention]
        merging = [p for p in self.parts if p.encoder_layers(REFERENCE_TOWER)]
        if between and merging:
            raise ValueError(
                f"{merging[0].info.name} merges tokens in the vision tower, where {between[0].info.name}"
                " reuses some of them: choose one of them."
            )
        mixing = [p for p in self.parts if p.temporal(REFERENCE_TOWER)]
        if mixing and (skipping := [p for p in between if "pixels" in p.info.stages]):
            raise ValueError(
                f"{mixing[0].info.name} lets frames attend to each other in the vision tower, where"
                f" {skipping[0].info.name} reuses some of their tokens: choose one of them."
            )
        places = {
            "between the tower and the LLM": at_projector,
            "inside the LLM": inside,
            "between frames": between,
            "on the KV cache": stored,
        }
        for where, rivals in places.items():
            if len(rivals) > 1:
                if all(isinstance(p, EncoderStrategy) for p in rivals):
                    where = "inside the encoder"
                names_found = " and ".join(p.info.name for p in rivals)
                twice = "mustdrop" in names_found and len(inside) == 1
                off = ", or give mustdrop merging=False and key_rate=0" if twice else ""
                raise ValueError(
                    f"{names_found} both act {where}, where only one can: choose one of them{off}."
                )
        return at_projector, inside, between, stored

    def describe(self) -> str:
        """The parts in the order in which they act, and the budget that they share."""
        parts = " then ".join(p.describe() for p in self.ordered)
        split = "" if self.split == type(self).split else f", split={self.split}"
        return parts if self.budget is None else f"{parts}, sharing budget={Budget(self.budget)}{split}"

    def budget_counts(self) -> str:
        told = [(p.info.name, p.budget_counts()) for p in self.ordered]
        return "; ".join(f"{name}: {words}" for name, words in told if words)

    @property
    def is_identity(self) -> bool:
        return all(p.is_identity for p in self.ordered)

    @property
    def in_encoder(self) -> Strategy:
        return self.first

    @property
    def acts_on_projector(self) -> bool:
        return self.first.acts_on_projector

    @property
    def acts_between_frames(self) -> bool:
        return self.between is not None

    @property
    def acts_on_cache(self) -> bool:
        return self.stored is not None and self.stored.acts_on_cache

    def attention(self) -> SparseAttention | None:
        return None if self.stored is None or self.stored.is_identity else self.stored.attention()

    def attend(self, tokens: AttentionTokens) -> Selection:
        assert self.stored is not None
        return self.stored.attend(tokens)

    def storage(self, num_layers: int) -> Storage | None:
        return None if self.stored is None or self.stored.is_identity else self.stored.storage(num_layers)

    def reuse(self, tower: TowerInfo) -> Reuse | PixelReuse | None:
        return None if self.between is None or self.between.is_identity else self.between.reuse(tower)

    def temporal(self, tower: TowerInfo) -> Temporal | None:
        return None if self.first.is_identity else self.first.temporal(tower)

    def needs(self, tower: TowerInfo | None) -> Needs:
        return self.first.needs(tower)

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens per segment that enter the LLM."""
        if budget is not None:
            return Composite(budget, self.parts, split=self.split).counts(segments)
        return self._for(sum(s.fed for s in segments), frames_of(segments)).counts(segments)

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int | None:
        n = sum(s.fed for s in segments) + separators
        return self._for(n, frames_of(segments)).total(segments, separators)

    def _kept_per_segment(self, segments: Sequence[Segment]) -> list[int] | None:
        return self._for(sum(s.fed for s in segments), frames_of(segments)).per_segment(segments)

    def select(self, tokens: VisualTokens) -> Selection:
        first = self._for(len(tokens), frames_of(tokens.segments))
        return (
            Selection.everything(len(tokens), tokens.cells.device)
            if first.is_identity
            else first.select(tokens)
        )

    def _for(self, n: int, frames: int) -> Strategy:
        """The projector strategy with its share of a whole-number budget for an item of n tokens."""
        if self.budget is None or self.allowance().is_share or n == 0:
            return self.first
        share = min(1.0, self.allowance().allowed(n, frames) / n) ** self.split
        return self.first.with_budget(float(share))

    def encoder_layers(self, tower: TowerInfo) -> tuple[int, ...]:
        return () if self.first.is_identity else self.first.encoder_layers(tower)

    def merge_in_encoder(self, tokens: EncoderTokens) -> EncoderMerge | None:
        return self.first.merge_in_encoder(tokens)

    def prefill_layers(self, num_layers: int, entering: float = 1.0) -> tuple[int, ...]:
        return (
            ()
            if self.then.is_identity
            else _ask(self.then.prefill_layers, num_layers, entering * self.entering)
        )

    def aligned_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.then.aligned_layers(num_layers)

    def check_depth(self, num_layers: int, entering: float = 1.0) -> None:
        _ask(self.then.check_depth, num_layers, entering * self.entering)

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        return self.then.select_in_prefill(replace(tokens, entering=tokens.entering * self.entering))


def _ask(method: Callable[..., Any], num_layers: int, entering: float) -> Any:
    """Ask a part that may have been written without `entering`, which few methods need."""
    takes_it = "entering" in inspect.signature(method).parameters
    return method(num_layers, entering) if takes_it else method(num_layers)
