"""Ledger of a KV cache with fewer tokens than the prompt: the token in each slot, per stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .ragged import right_aligned


@dataclass
class Cut:
    """The slots of one stage that stay: `index` (B, m) int64, `valid` (B, m) bool; `first`: the first m."""

    index: Tensor
    valid: Tensor
    first: bool


@dataclass
class Crop:
    """The latest crop into the tables of a cache: logical length after it, a cut per stage, layers done.

    `gone` is the number of slots that go in stage 0.
    """

    length: int
    cuts: list[Cut]
    gone: int
    done: set[int] = field(default_factory=set)


class Ledger:
    """The logical token in each slot of a KV cache, one table per stage (stage 0 = before the LLM).

    The tables end with the last visual token's forward. All later tokens take one slot each in every
    layer, so that decoding never touches this object and needs no device synchronisation. Where a cache
    loses tokens after a forward (`keep`), the tables end with that forward.

    Attributes:
        slots: per stage (batch, slots) int64, the logical index of a slot's token; -1 for filler.
        columns: per stage (batch, slots) int64, the slot of stage 0 that holds the same token.
        dropped: per stage, logical length minus number of slots.
        ragged: per stage, whether some slots are filler (kept on the host).
        shift: per stage (batch,) int64, tokens dropped so far, for `positions="renumber"`.
        real: (batch, end) bool, the logical tokens that are no padding.
        tables: per LLM layer, the stage whose table describes its slots.
        renumber: whether the stored tokens have positions without gaps.
        chunked: whether attention has chunks, which count from a row's first token that is no padding.
        gather: whether keys and values may be gathered along the sequence.
        counter: number of the first LLM layer whose cache has a length.
        states: the layers of the cache that have a state of fixed size.
        lead: the layer `counter` of the cache, if there are states.
        spoiled: whether a model without a patch may have changed the states.
        announced: whether a patched language model is reading the cache at this moment.
        crop: result of the first layer's crop, which the other layers apply.
        pending: visual tokens still to come in a chunked prefill; see `planner.ChunkedPlan`.
        evicted: whether slots were lost after the forward that filled them.
        places: (axes, batch, slots) int64, the position ids of the slots, where an eviction reads them.
        origin: the position ids of later tokens are so much less than those that the model counts.
        slid: slots that a window has lost since `origin` was changed.
        lost: (batch,) bool, the rows that a window has lost tokens of; None before it has.
        pictured: (batch,) bool, the rows that have had visual tokens; None before there were any.
    """

    def __init__(
        self,
        stages: int,
        batch_size: int,
        device: torch.device,
        tables: Sequence[int] = (),
        renumber: bool = False,
        chunked: bool = False,
    ) -> None:
        self.slots = [torch.empty(batch_size, 0, dtype=torch.long, device=device) for _ in range(stages)]
        self.columns = list(self.slots)
        self.dropped = [0] * stages
        self.ragged = [False] * stages
        self.shift = [torch.zeros(batch_size, dtype=torch.long, device=device) for _ in range(stages)]
        self.real = torch.empty(batch_size, 0, dtype=torch.bool, device=device)
        self.tables = list(tables) or [0]
        self.renumber = renumber
        self.chunked = chunked
        self.gather = True
        self.counter = 0
        self.states: list[Any] = []
        self.lead: Any = None
        self.spoiled = False
        self.announced = False
        self.crop: Crop | None = None
        self.pending: Any = None
        self.evicted = False
        self.places: Tensor | None = None
        self.lost: Tensor | None = None
        self.pictured: Tensor | None = None
        self.origin = self.slid = 0

    @property
    def end(self) -> int:
        """Logical tokens that the tables cover."""
        return self.slots[0].shape[1] + self.dropped[0]

    @property
    def batch_size(self) -> int:
        return self.slots[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.slots[0].device

    @property
    def shortened(self) -> bool:
        """Whether some layer stores another number of tokens than the prompt has, or filler."""
        return any(self.dropped) or any(self.ragged)

    @property
    def needs_mask(self) -> bool:
        """Whether the slots of stage 0 need a mask although the prompt has no padding."""
        return self.ragged[0] or (self.chunked and self.dropped[0] > 0)

    def table(self, layer: int) -> int:
        """The stage whose table describes the slots of LLM layer `layer`."""
        return self.tables[layer] if layer < len(self.tables) else 0

    def select_rows(self, rows: Any) -> None:
        """Follow a batch operation of the cache (beam reordering, repetition, selection)."""
        rows = rows.to(self.device) if isinstance(rows, Tensor) else rows
        self.slots = [t[rows] for t in self.slots]
        self.columns = [t[rows] for t in self.columns]
        self.shift = [t[rows] for t in self.shift]
        self.real = self.real[rows]
        self.places = None if self.places is None else self.places[:, rows]
        self.lost = None if self.lost is None else self.lost[rows]
        self.pictured = None if self.pictured is None else self.pictured[rows]

    def follow(self, physical: int, grow: bool, seen: Tensor | None = None) -> None:
        """Adapt to the first layer's physical length; `grow` adds text stored since then to the tables.

        What a mask `seen` over the slots of stage 0, (B, slots) bool, does not show is filler from then on.

        Raises:
            RuntimeError: if slots of the tables are gone.
        """
        extra = physical - self.slots[self.tables[0]].shape[1]
        if extra < 0:
            raise RuntimeError(
                f"This KV cache lost {-extra} slots of a shortened prompt since it was read: shorten it with"
                " cache.crop, or start with a new cache."
            )
        if grow and extra:
            new = torch.arange(extra, device=self.device).expand(self.batch_size, extra)
            end, width = self.end, self.slots[0].shape[1]
            self.slots = [torch.cat([t, end + new], 1) for t in self.slots]
            self.columns = [torch.cat([t, width + new], 1) for t in self.columns]
            self.real = torch.cat([self.real, torch.ones_like(new, dtype=torch.bool)], 1)
        if seen is not None:
            self.slots = [
                torch.where(seen.gather(1, columns), slots, -1)
                for slots, columns in zip(self.slots, self.columns, strict=True)
            ]
            self.ragged = [bool((slots < 0).any()) for slots in self.slots]

    def keep(self, index: Tensor, valid: Tensor | None) -> None:
        """Lose all slots but `index` (B, m) of caches whose layers have one table.

        Args:
            index: ascending per row; tokens that other layers keep in its place are no padding either.
            valid: (B, m) bool, False for filler; None if there is none.
        """
        end, slots = self.end, self.slots[0].gather(1, index)
        self.slots = [slots if valid is None else torch.where(valid, slots, -1)]
        self.columns = [torch.arange(index.shape[1], device=self.device).expand_as(index)]
        self.ragged, self.dropped = [valid is not None and not bool(valid.all())], [end - index.shape[1]]
        self.real = self.real[:, :0]  # read by crops alone, which an evicted cache refuses
        if self.places is not None:
            self.places = self.places.gather(2, index.expand(len(self.places), *index.shape))
        self.evicted = True

    def cuts(self, length: int) -> list[Cut]:
        """Per stage, the cut that removes the logical tokens from `length` (less than `end`) on.

        Rows may have lost different numbers of these tokens, so the remaining ones are aligned to the right
        again.
        """
        out = []
        for table in self.slots:
            index, valid = right_aligned((table >= 0) & (table < length), least=0)
            first = torch.arange(index.shape[1], device=index.device).expand_as(index)
            out.append(Cut(index, valid, bool(valid.all()) and torch.equal(index, first)))
        return out

    def forget(self, length: int, cuts: list[Cut]) -> None:
        """Remove the logical tokens from `length` on from the tables; `cuts` are those of `length`."""
        column = torch.zeros_like(self.slots[0])
        row, place = cuts[0].valid.nonzero(as_tuple=True)
        column[row, cuts[0].index[row, place]] = place
        tables = list(zip(cuts, self.slots, self.columns, strict=True))
        self.slots = [torch.where(c.valid, slots.gather(1, c.index), -1) for c, slots, _ in tables]
        self.columns = [
            torch.where(c.valid, column.gather(1, old.gather(1, c.index)), 0) for c, _, old in tables
        ]
        self.ragged = [not bool(c.valid.all()) for c in cuts]
        self.dropped = [length - slots.shape[1] for slots in self.slots]
        self.real = self.real[:, :length]
        if self.renumber:
            self.shift = [self.real.sum(1) - c.valid.sum(1) for c in cuts]
        self.pending = None

    def align(self, mask: Tensor) -> Tensor:
        """Align the last columns of a 2-D mask over logical tokens with the slots of stage 0.

        Raises:
            ValueError: if the mask does not cover tokens that the cache holds.
        """
        if mask.shape[1] < self.end:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns, the prompt in the KV cache has {self.end}"
                " tokens: pass a mask over the whole conversation, or none."
            )
        slots = self.slots[0]
        mask = mask.to(slots.device)
        past = mask.gather(1, slots.clamp(min=0)) * (slots >= 0).to(mask.dtype)
        return torch.cat([self._before(0, mask), past, mask[:, self.end :]], 1)

    def lose(self, stage: int, index: Tensor, valid: Tensor) -> None:
        """Lose all slots of one stage but `index` (B, m); `valid` (B, m) bool is False for filler."""
        end = self.end
        self.slots[stage] = torch.where(valid, self.slots[stage].gather(1, index), -1)
        self.columns[stage] = self.columns[stage].gather(1, index)
        self.ragged[stage] = not bool(valid.all())
        self.dropped[stage] = end - index.shape[1]

    def validity(self, stage: int, now: Tensor) -> Tensor:
        """A mask of one stage, if there was none; `now` (batch, m): validity of tokens after the tables."""
        slots = self.slots[stage]
        return torch.cat([self._before(stage, now), slots >= 0, now], 1)

    def _before(self, stage: int, like: Tensor) -> Tensor:
        """Columns of a mask before the first slot; all ones can be a mask that needs not be made at all."""
        return like.new_full((like.shape[0], self.dropped[stage]), not self.chunked)

    def append(
        self, stage: int, end: int, logical: Tensor, columns: Tensor, valid: Tensor, ragged: bool
    ) -> None:
        """Enter the tokens stored by one forward: `logical` (batch, m) indices; filler if not `valid`."""
        self.slots[stage] = torch.cat([self.slots[stage], torch.where(valid, end + logical, -1)], 1)
        self.columns[stage] = torch.cat([self.columns[stage], columns], 1)
        self.ragged[stage] = self.ragged[stage] or ragged
