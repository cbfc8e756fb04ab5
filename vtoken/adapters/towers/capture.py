"""Captures: the scores, frames of streams and merged patches gathered while a vision tower runs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...streams import References, StreamState, TowerUse
from ...temporal import TemporalPass
from ...tokens import TOWER_NEEDS, Needs
from ..encoders.run import EncoderRun

STORED = -1  # a frame whose reference came in an earlier call

Entry = tuple[Tensor, Tensor, Tensor]  # keys, values, and the layer's addition, (n, C) each


@dataclass
class FramePass:
    """The frames of one `get_*_features` call while they pass through the tower.

    Attributes:
        videos: frames of every video, in tower order; none where each frame is looked at by itself.
        state: the stream that they continue; without one, every video is a stream of its own.
        grids: per frame (rows, columns) of patches.
        signatures: per frame, the facts that it must share with its reference.
        reference: per frame None if it is computed in full, else the frame to compare with, or STORED.
        entries: those of the running layer, by reference frame.
        stored: per layer, the entries that outlive the call.
        chosen: by the first frame of a group, the tokens that all layers compute, if one choice is shared.
        sizes: per frame, its number of tokens.
        counts: per frame (tokens,) float32, the number of reusing layers that computed a token.
        layers: number of reusing layers so far.
        age: age of the last reference after the call.
        use: work of the tower.
        windows: see `Rows`.
        parts: outputs of the modules of the running layer, while it is computed in full.
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
    parts: dict[str, Tensor] | None = None

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
        """The frames that are references."""
        return [i for i, r in enumerate(self.reference) if r is None]

    @property
    def groups(self) -> list[list[int]]:
        """The other frames, grouped by shape."""
        out: dict[Hashable, list[int]] = {}
        for i, r in enumerate(self.reference):
            if r is not None:
                out.setdefault(self.signatures[i], []).append(i)
        return list(out.values())

    def entry(self, i: int, layer: int) -> Entry:
        """The entry that frame i is compared with in a layer."""
        reference = self.reference[i]
        assert reference is not None
        if reference != STORED:
            return self.entries[reference]
        assert self.state is not None and self.state.references is not None
        return self.state.references.layers[layer]

    def commit(self) -> None:
        """Store the new references in the stream, once the whole call has succeeded."""
        if self.state is None or not self.reference:
            return
        if self.full:
            self.state.references = References(self.signatures[self.full[-1]], self.age, self.stored)
        elif self.state.references is not None:
            self.state.references.age = self.age
        self.state.add(self.use)


@dataclass
class Capture:
    """Values that the taps of one `get_*_features` call gathered, chunk by chunk in tower order.

    Every value is a list of (segments, ...) tensors; the segments of one tensor share a grid.

    Attributes:
        modality: the modality being encoded; a tower may serve several.
        needs: the values to read for it.
        merged: the tower's forward, while a tower that merges runs.
        owners: after it has run, chunk by chunk, (segments, patches) int64, the patch in whose place the
            token of each patch stands, -1 for a dropped patch.
        frames: the frames of streams that the call encodes, None if nothing is reused between frames.
        temporal: the frames of the call, if a strategy attends across them inside the tower.
        pending: values that a tower's hooks hold until they can add them.
    """

    modality: str
    needs: Needs
    values: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    merged: EncoderRun | None = None
    owners: list[Tensor] = field(default_factory=list)
    frames: FramePass | None = None
    temporal: TemporalPass | None = None
    pending: dict[Any, Any] = field(default_factory=dict)

    def add(self, what: str, layer: int, value: Tensor) -> None:
        self.values.setdefault((what, layer), []).append(value)

    @property
    def missing(self) -> list[tuple[str, int]]:
        """The values that were wanted and not read."""
        wanted = [(kind, layer) for kind in TOWER_NEEDS for layer in getattr(self.needs, kind)]
        return [each for each in wanted if each not in self.values]

    def per_item(self, counts: Sequence[int]) -> list[dict[tuple[str, int], Tensor]]:
        """Per image or video, its values, (segments, ...) each; `counts` are its numbers of segments.

        Raises:
            RuntimeError: if the tower ran over another number of segments.
        """
        items: list[dict[tuple[str, int], Tensor]] = [{} for _ in counts]
        for (what, layer), chunks in self.values.items():
            split = self._split(f"{what}({layer})", chunks, counts)
            for item, value in zip(items, split, strict=True):
                item[what, layer] = value
        return items

    def merged_per_item(self, counts: Sequence[int]) -> list[Tensor | None]:
        """Per image or video (patches,) int64, see `VisualTokens.merged`; None without merges."""
        if not self.owners:
            return [None] * len(counts)
        items = self._split("merged", self.owners, counts)
        # cells of a segment follow those of the previous one
        first = [torch.arange(len(m), device=m.device)[:, None] * m.shape[1] for m in items]
        return [(m + at).where(m >= 0, -1).flatten() for m, at in zip(items, first, strict=True)]

    @staticmethod
    def _split(what: str, chunks: list[Tensor], counts: Sequence[int]) -> list[Tensor]:
        segments = [segment for chunk in chunks for segment in chunk]
        if len(segments) != sum(counts):
            raise RuntimeError(
                f"{what} was read for {len(segments)} segments but the layout has {sum(counts)}: "
                "the adapter does not know this kind of input."
            )
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [torch.stack(segments[end - count : end]) for end, count in zip(ends, counts, strict=True)]
