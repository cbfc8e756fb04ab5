"""State of one forward, shared by the hooks: its arguments, the plan, and the observer that records it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._threads import PerThread
from ..adapters.towers.capture import Capture
from ..selection import Selection
from ..storage import PromptTokens
from .ledger import Ledger
from .prompt import Choice, EncodedVisuals, Prompt

ENCODED = "_vtoken_encoded"  # attribute of a model's features


@dataclass
class Call:
    """One forward of the base model: its arguments, and the findings of the hooks while it runs."""

    input_ids: Tensor | None = None
    given: dict[str, Any] = field(default_factory=dict)  # the arguments of the base model
    visual: dict[str, Tensor] = field(default_factory=dict)  # modality -> (B, q) bool
    encoded: dict[str, EncodedVisuals | None] = field(default_factory=dict)  # by modality
    has_features: bool = False
    read: bool = False  # whether the language model was called
    ledger: Ledger | None = None  # of the cache that the base model was given
    mask_aligned: bool = False


@dataclass
class Plan:
    """The plan for the tokens of one forward.

    `keep` (B, q) bool marks the tokens that stay; `into` and `weight` (B, q), by position, tell which kept
    token absorbs each dropped one.

    `source` (B, q) int64 is the row of `features` that replaces a token's own features, -1 for none.
    """

    keep: Tensor
    into: Tensor | None = None
    weight: Tensor | None = None
    source: Tensor | None = None
    features: Tensor | None = None

    def follow(self, rows: int | slice, places: Tensor, selection: Selection) -> None:
        """Enter for batch `rows` a strategy's answer about the tokens at the positions `places` (n,)."""
        kept = selection.keep.to(places.device)
        dropped = torch.ones(len(places), dtype=torch.bool, device=places.device)
        dropped[kept] = False
        self.keep[rows, places[dropped]] = False
        if selection.features is not None:
            before = selection.features[:0] if self.features is None else self.features
            if self.source is None:
                self.source = torch.full_like(self.keep, -1, dtype=torch.long)
            self.source[rows, places[kept]] = torch.arange(len(kept), device=places.device) + len(before)
            self.features = torch.cat([before, selection.features.to(before)])
        if selection.into is None or selection.weight is None:
            return
        if self.into is None or self.weight is None:
            self.into = torch.full_like(self.keep, -1, dtype=torch.long)
            self.weight = torch.zeros_like(self.keep, dtype=torch.float32)
        target = selection.into.to(places.device)
        self.into[rows, places] = torch.where(target >= 0, places[kept][target.clamp(min=0)], -1)
        self.weight[rows, places] = selection.weight.to(self.weight)


@dataclass
class PromptLayout:
    """Facts about the visual tokens of one forward, laid out over its (B, q) positions.

    Attributes:
        item: the image or video of its row that a token belongs to, -1 for text.
        separator: visual tokens that are no patch.
        marked: the tokens that the strategy marked at the projector stage.
        units: per row, its images and video frames.
    """

    item: Tensor
    separator: Tensor
    marked: Tensor
    units: list[int]


@dataclass(frozen=True)
class Attended:
    """The tokens that the attention of one layer reads.

    Attributes:
        now: their places in stage 0 and whether they are no filler, as in `Run.now`.
        rows: (B, m) int64, their places among the tokens that the layer reads; None for all of these.
        probes: per row, queries whose attention was computed for the choice.
    """

    now: tuple[Tensor, Tensor]
    rows: Tensor | None
    probes: list[int]


@dataclass
class Run:
    """One forward of the language model on a shortened prompt, or after one."""

    cache: Any
    ledger: Ledger
    query_length: int
    visual: Tensor | None = None  # (B, q) bool; None in decode and text turns
    index: Tensor | None = None  # (B, n): position in the prompt's forward of every token after the entrance
    real: Tensor | None = None  # (B, q) bool: tokens that are not padding
    first: Tensor | None = None  # (B, q) int64 if rows hold several packed prompts, see packed_rows.py
    # (1, n) int64, for flash attention: places after the entrance within packed prompts
    ranks: Tensor | None = None
    # other arguments of the language model with a row per token: (B, q, ...) by name
    tokenwise: dict[str, Tensor] = field(default_factory=dict)
    asked: int = 0  # the number of last tokens that the language model may answer for alone, 0 for all
    past_slots: int = 0
    now: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # per stage: (index into stage 0, valid)
    ragged: list[bool] = field(default_factory=list)
    reviews: bool = False  # whether tokens after the prompt are chosen among when the forward ends
    # by layer, of layers with sparse attention
    attended: dict[int, Attended] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    # layer, attention, its input, rotary tables, mask
    tap: tuple[int, nn.Module, Tensor, Any, Any] | None = None
    layout: PromptLayout | None = None
    # (B,): position in this forward at which a row's prompt ends and its answer begins
    ends: Tensor | None = None
    # (B,): position of the token from which a row's answer is read, -1 for an empty row
    queries: Tensor | None = None
    # answers inside the LLM, by (stage, row)
    drops: dict[tuple[int, int], Selection] = field(default_factory=dict)
    choice: Choice | None = None  # if every step reads the prompt again
    positions: Tensor | None = None  # position ids after the entrance, for positions="renumber"
    # (B, slots + q) bool: what the mask of a forward without visual tokens shows of a cache that loses tokens
    seen: Tensor | None = None
    past_seen: Tensor | None = None  # (B, past_slots) bool: tokens of earlier forwards that the mask shows
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)  # per row, see PrefillTokens
    tokens: PromptTokens | None = None  # after the entrance, for a cache in a strategy's form

    @property
    def static(self) -> bool:
        return self.cache is not None and self.cache.is_compileable

    def stages(self) -> list[tuple[Tensor, Tensor]]:
        """As `now`, with the stages of the layers with sparse attention."""
        return [*self.now, *(self.attended[layer].now for layer in sorted(self.attended))]

    @property
    def candidates(self) -> Tensor:
        """(B, q) bool: the visual tokens that may be dropped: all except the queries."""
        assert self.visual is not None and self.queries is not None
        place = torch.arange(self.query_length, device=self.visual.device)
        return self.visual & (place != self.queries[:, None])


@dataclass(frozen=True)
class ReadTokens:
    """(B, q) bool: the tokens of a forward that are not padding, and those that the LLM read to its end."""

    real: Tensor
    kept: Tensor


class ForwardContext(PerThread):
    """State of the calls of one patch in this thread, shared by its hooks.

    Attributes:
        prompt: of a running `generate()`.
        labels: of a forward of the model.
        call: a forward of the base model.
        run: a forward of the language model on a shortened prompt, or after one.
        capture: a call of `get_*_features`.
        reading: the device of a language model that reads visual tokens, None while it reads none.
        unread: whether a running `generate()` has encoded features that the language model has not yet read.
        disabled: whether the call reads all visual tokens.
        read: tokens of the last forward with pictures, all real ones and those that the LLM read to its end.
        early: a forward of the model, whose head may encode pictures before it calls the base model.
    """

    prompt: Prompt | None = None
    labels: Tensor | None = None
    call: Call | None = None
    run: Run | None = None
    capture: Capture | None = None
    reading: torch.device | None = None
    unread: bool = False
    disabled: bool = False
    read: ReadTokens | None = None
    early: Call | None = None


class Admission(Protocol):
    """Tells which calls of a model belong to a patch; several patches may have hooks on one model."""

    def serves(self) -> bool:
        """Whether a call made here and now uses the patch."""

    def call(self) -> AbstractContextManager[bool]:
        """Use the patch to the end of a call; yields False if the call is not the patch's."""

    def check(self) -> None:
        """Raise RuntimeError if the patch no longer fits the options of its strategy."""

    def disabled(self) -> bool:
        """Whether calls read all visual tokens now."""

    def forward_begins(self) -> bool:
        """Whether a forward of the base model uses the patch, whose hooks then stay until `forward_ended`."""

    def forward_ended(self) -> None:
        """Note the end of the forward."""


class ForwardObserver(Protocol):
    """Records a patched model's calls."""

    def before_prefill(self, device: torch.device) -> None:
        """Note that the language model is about to read visual tokens."""

    def entered(self, run: Run, real: Tensor) -> None:
        """Note the gathered tokens; `real` (B, q) bool marks tokens that are not padding."""

    def holds(self, nbytes: int, tokens: int) -> None:
        """Note the bytes of a row of a KV cache that tokens are evicted from, and its logical tokens."""

    def after_prefill(self, run: Run | None, device: torch.device) -> None:
        """Note that the language model has answered; `run` is None if nothing was dropped."""
