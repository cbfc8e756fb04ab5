"""Location of each frame of a call in the input of a tower layer."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..adapters.towers.capture import FramePass


class Rows:
    """The frames of a layer's input: a batch of equal frames, or a packed sequence with bounds and tables.

    Args:
        x: (frames, n, C) or (tokens, C).
        run: its grids tell the frames of a packed sequence; bounds are read from the device once per call.
        kwargs: keyword arguments of the layer.
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
        """Per frame, the lengths of its windows."""
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
        """Frames in the layout of the layer's input."""
        if len(frames) == len(self.sizes):
            return self.x
        return torch.cat([self.x[self.spans[i]] for i in frames]) if self.packed else self.x[frames]

    def arguments(self, frames: list[int]) -> dict[str, Any]:
        """The layer's keyword arguments for these frames alone."""
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
        """Split a tensor laid out as `take(frames)` frame by frame."""
        return list(x.split([self.sizes[i] for i in frames])) if self.packed else list(x)

    def put(self, out: Tensor, frames: list[int], x: Tensor) -> None:
        """Write (frames, n, C), or a tensor laid out as `take(frames)`, into one laid out as the input."""
        for i, mine in zip(frames, self.split(x, frames) if x.ndim == self.x.ndim else x, strict=True):
            out[self.spans[i] if self.packed else i] = mine


def stack(tensors: list[Tensor]) -> Tensor:
    """torch.stack along a new first dimension; a view of a single tensor."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]
