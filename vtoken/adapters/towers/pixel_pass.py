"""Frames of one call of which some places are taken from others or from earlier frames, as tables of rows."""

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
        origins: per frame (tokens,) int64 on the CPU, the computed token of the frame whose row each takes,
            `PixelReuse.EARLIER` for its own in the reference.
        keeps: whether the stream's next frames may take what is computed.
        pixels: (rows, columns, patches, values), the reference of the last frame.
        uses_stored: whether the pool begins with the stored reference.
        whole: (a,) int64, the rows of all frames that are computed in full, among the tokens of the call.
        some: (m,) int64, the computed rows of the other frames.
        source: (tokens of the call,) int64, the row of the pool that each token takes.
        last: (n,) int64, the rows of the pool that the stream keeps.
        embedded: (tokens of the call,) bool, the rows of the pixels that are computed.
        unit: patches of a place, which stand together.
        outputs: (pool, C) of the latest layer, None where it computed every token.
        queries: by the bounds of attention windows, the queries that have equally many keys, see `attending`.
    """

    origins: list[Tensor] = field(default_factory=list)
    keeps: bool = False
    pixels: Tensor | None = None
    uses_stored: bool = False
    whole: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    some: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    source: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    last: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    embedded: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    unit: int = 1
    outputs: Tensor | None = None
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
        self.keeps = self.state is not None and reuse.interval > 1
        origins = self._asked([pixels for pixels, _ in places], reuse)
        each = torch.cat([o.flatten() for o in origins]).cpu().split([o.numel() for o in origins])
        self.origins = [of_tokens(o, tokens, prefix) for o, (_, tokens) in zip(each, places, strict=True)]
        self.sizes = [len(o) for o in self.origins]
        self._tabulate(places[0][0].device)
        self.unit = places[0][1].shape[-1]
        own = [o == torch.arange(len(o)) for o in each]
        self.embedded = torch.cat(own).repeat_interleave(self.unit).to(self.source.device)

    def _asked(self, pixels: list[Tensor], reuse: PixelReuse) -> list[Tensor]:
        """Per frame (rows, columns) int64, the strategy's answers."""
        out: list[Tensor] = []
        for count in self.videos:
            old = None if self.state is None else self.state.references
            reference, signature, age = (
                (None, None, 0) if old is None else (old.pixels, old.signature, old.age)
            )
            for i in range(len(out), len(out) + count):
                now = pixels[i]
                if signature != self.signatures[i] or age >= reuse.interval:
                    reference, signature, age = None, self.signatures[i], 0
                with torch.no_grad():
                    out.append(reuse.origins(now, reference))
                if reference is None:
                    reference = now
                else:
                    earlier = out[-1] == reuse.EARLIER
                    reference = torch.where(earlier[:, :, None, None], reference, now)
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
        for mine, origin in zip(every, self.origins, strict=True):
            here, earlier = place[mine][origin], origin == PixelReuse.EARLIER
            last = last.where(earlier, here) if bool(earlier.any()) else here
            source.append(last)
        self.whole, self.some = at_whole.to(device), at_some.to(device)
        self.source, self.last = torch.cat(source).to(device), last.to(device)

    @cached_property
    def computed(self) -> list[Tensor]:
        """Per frame (tokens,) bool on the CPU, what is computed."""
        return [origin == torch.arange(len(origin)) for origin in self.origins]

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

    def merged(self, made: Tensor) -> Tensor:
        """Rows of all places of the call, from those of the places of the pool."""
        return made[self.source[:: self.unit] // self.unit]

    def commit(self) -> None:
        """Store the reference in the stream, once the whole call has succeeded."""
        if self.state is None or self.pixels is None:
            return
        if self.keeps:
            signature = self.signatures[-1]
            self.state.references = References(signature, self.age, self.stored, keep(self.pixels))
        self.state.add(self.use)

    def store(self, layer: int, pools: Entry) -> None:
        """Keep what later calls take of a layer; pools without rows stay empty."""
        if not self.keeps or self.state is None:
            return
        if self.state.references is not None and not self.full and not self.in_part:
            self.stored[layer] = self.state.references.layers[layer]
            return
        key, value, out = (keep(pool[self.last]) if len(pool) else pool for pool in pools)
        self.stored[layer] = key, value, out


def of_tokens(origins: Tensor, tokens: Tensor, prefix: int) -> Tensor:
    """Origins of places (places,) as those of tokens (n,) int64: place by place, patch by patch.

    Args:
        tokens: (rows, columns, patches) int64 without the prefix, see `Tower.frame_patches`.
        prefix: tokens at the start of a frame that are no patch; computed with any place.

    Raises:
        ValueError: for an origin that takes the rows of another place itself.
    """
    taken = origins[origins != PixelReuse.EARLIER]
    if not torch.equal(origins[taken], taken):
        raise ValueError("PixelReuse.origins must name places that are computed, which name themselves.")
    tokens, earlier = prefix + tokens.flatten(0, 1), origins == PixelReuse.EARLIER
    out = torch.arange(prefix + tokens.numel())
    out[tokens] = tokens[origins].masked_fill(earlier[:, None], PixelReuse.EARLIER)
    if bool(earlier.all()):
        out[:prefix] = PixelReuse.EARLIER
    return out
