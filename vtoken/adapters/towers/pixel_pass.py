"""Frames of one call whose unchanged places are taken from earlier frames, as tables of rows."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...streams import PixelReuse, References, keep
from .capture import Entry, FramePass


@dataclass
class PixelPass(FramePass):
    """As `FramePass`, where the pixels decide before the first layer which tokens are computed.

    The pool of a layer is the rows of the stream's stored reference, if there is one, those of the frames
    that are computed in full, and the computed rows of the other frames, in this order.

    Attributes:
        computed: per frame (tokens,) bool on the CPU, what is computed.
        pixels: (rows, columns, patches, values), the reference of the last frame.
        uses_stored: whether the pool begins with the stored reference.
        whole: (a,) int64, the rows of all frames that are computed in full, among the tokens of the call.
        some: (m,) int64, the computed rows of the other frames.
        source: (tokens of the call,) int64, the row of the pool that each token takes.
        last: (n,) int64, the rows of the pool that the stream keeps.
        queries: by the bounds of attention windows, the queries that have equally many keys, see `attending`.
    """

    computed: list[Tensor] = field(default_factory=list)
    pixels: Tensor | None = None
    uses_stored: bool = False
    whole: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    some: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    source: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    last: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    queries: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def compare(
        self, kind: Hashable, places: list[tuple[Tensor, Tensor]], reuse: PixelReuse, prefix: int
    ) -> None:
        """Decide what is computed, from the pixels and tokens of every place of every frame.

        Args:
            kind: a frame of another kind or grid than its reference is computed in full.
            places: see `Tower.frame_patches`.
            prefix: tokens at the start of a frame that are no patch; computed with any place.
        """
        self.signatures = [(grid, kind) for grid in self.grids]
        changed = self._changed([pixels for pixels, _ in places], reuse)
        sizes = [c.numel() for c in changed]
        self.computed = []
        for mine, (_, tokens) in zip(
            torch.cat([c.flatten() for c in changed]).cpu().split(sizes), places, strict=True
        ):
            out = torch.zeros(prefix + tokens.numel(), dtype=torch.bool)
            out[prefix + tokens.flatten(0, 1)[mine].flatten()] = True
            out[:prefix] = mine.any()
            self.computed.append(out)
        self.sizes = [len(c) for c in self.computed]
        self._tabulate(places[0][0].device)

    def _changed(self, pixels: list[Tensor], reuse: PixelReuse) -> list[Tensor]:
        """Per frame (rows, columns) bool, the places that differ from their reference or have none."""
        out: list[Tensor] = []
        for count in self.videos:
            old = None if self.state is None else self.state.references
            reference, signature, age = (
                (None, None, 0) if old is None else (old.pixels, old.signature, old.age)
            )
            for i in range(len(out), len(out) + count):
                now = pixels[i]
                if reference is None or signature != self.signatures[i] or age >= reuse.interval:
                    differs = torch.ones(now.shape[:2], dtype=torch.bool, device=now.device)
                    reference, signature, age = now, self.signatures[i], 0
                else:
                    with torch.no_grad():
                        differs = reuse.changed(now, reference)
                    reference = torch.where(differs[:, :, None, None], now, reference)
                out.append(differs)
                age += 1
            self.pixels, self.age = reference, age
        return out

    def _tabulate(self, device: torch.device) -> None:
        """Make the tables of rows."""
        stored = None if self.state is None else self.state.references
        self.uses_stored = stored is not None and stored.signature == self.signatures[0]
        known = self.sizes[0] if self.uses_stored else 0
        every = torch.arange(sum(self.sizes)).split(self.sizes)
        none = torch.empty(0, dtype=torch.long)
        at_whole = torch.cat([none, *(every[i] for i in self.full)])
        at_some = torch.cat([none, *(every[i][self.computed[i]] for i in self.in_part)])
        place = torch.empty(sum(self.sizes), dtype=torch.long)  # in the pool, of every computed token
        place[torch.cat([at_whole, at_some])] = known + torch.arange(len(at_whole) + len(at_some))
        last, source = torch.arange(known), []
        for i, mine in enumerate(every):
            last = place[mine] if i in self.full else last.where(~self.computed[i], place[mine])
            source.append(last)
        self.whole, self.some = at_whole.to(device), at_some.to(device)
        self.source, self.last = torch.cat(source).to(device), last.to(device)

    @cached_property
    def full(self) -> list[int]:
        """The frames of which every token is computed."""
        return [i for i, c in enumerate(self.computed) if bool(c.all())]

    @cached_property
    def in_part(self) -> list[int]:
        """The frames of which some tokens are computed."""
        return [i for i, c in enumerate(self.computed) if bool(c.any()) and not bool(c.all())]

    def attending(self, windows: list[list[int]], key: int) -> list[tuple[Tensor, Tensor]]:
        """The queries of frames that are computed in part, in groups with equally many queries and keys.

        Args:
            windows: per frame, the lengths of its attention windows.
            key: under which the answer is remembered.

        Returns:
            Per group (windows, m) int64, rows among `some`, and (windows, n) int64, rows of the pool.
        """
        if key in self.queries:
            return self.queries[key]
        frames, groups = self.in_part, []
        source = self.source.cpu().split(self.sizes)
        keys = torch.cat([source[i] for i in frames])
        lengths = torch.tensor([n for i in frames for n in windows[i]])
        window = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        counts = torch.bincount(window[torch.cat([self.computed[i] for i in frames])], minlength=len(lengths))
        shapes = torch.stack([counts, lengths], 1)
        first_query, first_key = counts.cumsum(0) - counts, lengths.cumsum(0) - lengths
        for shape in shapes[counts > 0].unique(dim=0):
            some = (shapes == shape).all(1).nonzero()
            m, n = shape.tolist()
            query, at = first_query[some] + torch.arange(m), first_key[some] + torch.arange(n)
            groups.append((query.to(self.some.device), keys[at].to(self.some.device)))
        self.queries[key] = groups
        return groups

    def _stored(self, layer: int, what: int) -> list[Tensor]:
        if not self.uses_stored:
            return []
        assert self.state is not None and self.state.references is not None
        return [self.state.references.layers[layer][what]]

    def pool(self, layer: int, what: int, rows: list[Tensor]) -> Tensor:
        """(pool, C) of a layer's keys (0), values (1) or outputs (2), from the computed rows."""
        each = [*self._stored(layer, what), *rows]
        return torch.cat(each) if len(each) > 1 else each[0]

    def commit(self) -> None:
        """Store the reference in the stream, once the whole call has succeeded."""
        if self.state is None or not self.computed or self.pixels is None:
            return
        signature = self.signatures[-1]
        self.state.references = References(signature, self.age, self.stored, keep(self.pixels))
        self.state.add(self.use)

    def store(self, layer: int, pools: Entry) -> None:
        """Keep what later calls take of a layer; pools without rows stay empty."""
        if self.state is None:
            return
        if self.state.references is not None and not self.full and not self.in_part:
            self.stored[layer] = self.state.references.layers[layer]
            return
        key, value, out = (keep(pool[self.last]) if len(pool) else pool for pool in pools)
        self.stored[layer] = key, value, out
