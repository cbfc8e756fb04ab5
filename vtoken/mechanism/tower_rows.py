"""Which frames of a call are computed in full, and where each frame lies in a layer's input."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..streams import References, StreamState, TowerUse

STORED = -1  # a frame whose reference came with an earlier call

Entry = tuple[Tensor, Tensor, Tensor]  # keys, values, and what the layer added, (n, C) each


@dataclass
class FramePass:
    """The frames of one `get_*_features` call on their way through the tower.

    Attributes:
        videos: frames of every video, in tower order.
        state: the stream that they continue; without one every video is a stream of its own.
        grids: per frame (rows, columns) of patches.
        signatures: per frame what it must share with a reference.
        reference: per frame None if it is computed in full, else the frame to compare with, or STORED.
        entries: of the layer under way, by reference frame.
        stored: per layer what outlives the call.
        chosen: by the first frame of a group the tokens that all layers compute, if one choice is shared.
        sizes: per frame its tokens.
        counts: per frame (tokens,) float32, in how many reusing layers a token was computed.
        layers: reusing layers so far.
        age: of the last reference, behind the call.
        use: what it all cost.
        windows: see `Rows`.
    """

    videos: list[int]
    state: StreamState | None
    grids: list[tuple[int, int]] = field(default_factory=list)
    signatures: list[Hashable] = field(default_factory=list)
    reference: list[int | None] = field(default_factory=list)
    entries: dict[int, Entry] = field(default_factory=dict)
    stored: dict[int, Entry] = field(default_factory=dict)
    chosen: dict[int, Tensor] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    layers: int = 0
    age: int = 0
    use: TowerUse = field(default_factory=TowerUse)
    windows: dict[int, tuple[Tensor, list[list[int]]]] = field(default_factory=dict)

    def plan(self, kind: Hashable, interval: int) -> None:
        """Decide which frames are references; frames of another `kind` or grid are never compared."""
        self.signatures, self.reference = [(grid, kind) for grid in self.grids], []
        for count in self.videos:
            old = None if self.state is None else self.state.references
            last, signature, age = (None, None, 0) if old is None else (STORED, old.signature, old.age)
            for i in range(len(self.reference), len(self.reference) + count):
                if last is None or self.signatures[i] != signature or age >= interval:
                    last, signature, age = i, self.signatures[i], 0
                    self.reference.append(None)
                else:
                    self.reference.append(last)
                age += 1
            self.age = age

    @property
    def full(self) -> list[int]:
        """Frames that are references."""
        return [i for i, r in enumerate(self.reference) if r is None]

    @property
    def groups(self) -> list[list[int]]:
        """The other frames, those of one shape together."""
        out: dict[Hashable, list[int]] = {}
        for i, r in enumerate(self.reference):
            if r is not None:
                out.setdefault(self.signatures[i], []).append(i)
        return list(out.values())

    def entry(self, i: int, layer: int) -> Entry:
        """What frame i is compared with in a layer."""
        reference = self.reference[i]
        assert reference is not None
        if reference != STORED:
            return self.entries[reference]
        assert self.state is not None and self.state.references is not None
        return self.state.references.layers[layer]

    def commit(self) -> None:
        """Let the stream remember, once the whole call has gone well."""
        if self.state is None or not self.reference:
            return
        if self.full:
            self.state.references = References(self.signatures[self.full[-1]], self.age, self.stored)
        elif self.state.references is not None:
            self.state.references.age = self.age
        self.state.add(self.use)


class Rows:
    """The frames of a layer's input: a batch of equal ones, or one packed sequence with its bounds and rotary tables.

    Args:
        x: (frames, n, C) or (tokens, C).
        run: its grids tell the frames of a packed sequence; bounds are read from the device once per call.
        kwargs: of the layer.
    """

    def __init__(self, x: Tensor, run: FramePass, kwargs: dict[str, Any]) -> None:
        self.x, self.kwargs, self.packed = x, kwargs, x.ndim == 2
        self.sizes = [h * w if self.packed else x.shape[1] for h, w in run.grids]
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        self.spans = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        if self.packed and ends[-1] != len(x):
            raise RuntimeError(f"The tower has {len(x)} tokens where its frames have {ends[-1]}.")
        self.windows = [[n] for n in self.sizes]
        bounds = kwargs.get("cu_seqlens") if self.packed else None
        if bounds is not None:
            if id(bounds) not in run.windows:
                run.windows[id(bounds)] = bounds, self._cut(bounds.tolist())
            self.windows = run.windows[id(bounds)][1]

    def _cut(self, bounds: list[int]) -> list[list[int]]:
        """Per frame the lengths of its windows."""
        return [
            [b - a for a, b in itertools.pairwise(bounds) if span.start <= a and b <= span.stop and b > a]
            for span in self.spans
        ]

    def of(self, frames: list[int]) -> Tensor:
        """Frames of one shape, (frames, n, C)."""
        if not self.packed:
            return self.x if len(frames) == len(self.x) else self.x[frames]
        return stack([self.x[self.spans[i]] for i in frames])

    def take(self, frames: list[int]) -> Tensor:
        """Frames as the layer takes them."""
        if len(frames) == len(self.sizes):
            return self.x
        return torch.cat([self.x[self.spans[i]] for i in frames]) if self.packed else self.x[frames]

    def arguments(self, frames: list[int]) -> dict[str, Any]:
        """The layer's keyword arguments that concern these frames alone."""
        if not self.packed or len(frames) == len(self.sizes):
            return {}
        lengths = [0] + [n for i in frames for n in self.windows[i]]
        out: dict[str, Any] = {"cu_seqlens": torch.tensor(lengths).cumsum(0).to(self.kwargs["cu_seqlens"])}
        rotary = self.kwargs.get("position_embeddings")
        if rotary is not None:
            out["position_embeddings"] = tuple(torch.cat([x[self.spans[i]] for i in frames]) for x in rotary)
        return out

    def rotary(self, i: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines (n, head_dim) of a frame."""
        rotary = self.kwargs.get("position_embeddings") if self.packed else None
        return None if rotary is None else (rotary[0][self.spans[i]], rotary[1][self.spans[i]])

    def split(self, x: Tensor, frames: list[int]) -> list[Tensor]:
        """Something laid out as `take(frames)`, frame by frame."""
        return list(x.split([self.sizes[i] for i in frames])) if self.packed else list(x)

    def put(self, out: Tensor, frames: list[int], x: Tensor) -> None:
        """Write (frames, n, C), or something laid out as `take(frames)`, into a tensor laid out as the input."""
        for i, mine in zip(frames, self.split(x, frames) if x.ndim == self.x.ndim else x, strict=True):
            out[self.spans[i] if self.packed else i] = mine


def stack(tensors: list[Tensor]) -> Tensor:
    """As torch.stack along a new first dimension; a view of a single one."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]
