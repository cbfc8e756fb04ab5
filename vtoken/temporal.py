"""Attention across frames inside a vision tower: a strategy's declaration, and the frames of one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .streams import StreamState, keep

Past = dict[int, tuple[Tensor, ...]]


@dataclass
class FrameSteps:
    """The frames of one call of a tower, in sequences that do not see each other.

    Attributes:
        lengths: frames of every sequence, in tower order.
        start: time step of the first frame: the frames of a stream that came before this call.
        past: by layer, what earlier calls of the stream left for this one; empty outside of streams.
        left: by layer, what this call leaves for the next one.
        streams: whether the call continues a stream.
        prefix: tokens of a frame before its patches (CLS).
    """

    lengths: list[int]
    start: int = 0
    past: Past = field(default_factory=dict)
    left: Past = field(default_factory=dict)
    streams: bool = False
    prefix: int = 0


Mix = Callable[[int, Tensor, FrameSteps], Tensor]


@dataclass(frozen=True)
class Temporal:
    """Attention of a strategy across the frames of a sequence, inside a vision tower.

    Attributes:
        layers: ascending tower layers, up to the one that feeds the projector.
        mix: `mix(layer, hidden (frames, n, C), FrameSteps) -> (frames, n, C)`, prefix tokens (CLS) first.
        between: whether it acts between a layer's attention and its MLP, else before the layer.
        repeats: frames of the static video that an image becomes. The layers before the first of `layers` run
            once for all of them.
    """

    layers: tuple[int, ...]
    mix: Mix
    between: bool = False
    repeats: int = 1

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Temporal):
            return NotImplemented
        mine, theirs = ((x.layers, x.between, x.repeats) for x in (self, other))
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]


@dataclass
class TemporalPass:
    """The frames of one `get_*_features` call, while they pass through the tower.

    Attributes:
        lengths: frames of every video; None for images, each of which is a sequence of its own.
        state: the stream that they continue, if any.
        first: the first layer in which the strategy acts.
        steps: of the running forward of the tower.
        frames: the hidden states of all frames, while the layers pass on some of them.
        layer: the layer that is next.
        checkpointed: whether the tower's layers are computed again in the backward pass.
    """

    lengths: list[int] | None
    state: StreamState | None
    first: int
    steps: FrameSteps | None = None
    frames: Tensor | None = None
    layer: int = -1
    checkpointed: bool = False

    def begin(self, rows: int, repeats: int, prefix: int) -> FrameSteps:
        """The steps of a forward over so many rows."""
        lengths = [repeats] * rows if self.lengths is None else self.lengths
        if self.lengths is not None and sum(lengths) != rows:
            raise RuntimeError(
                f"The tower was given {rows} frames but the call has {sum(lengths)}: the adapter does not"
                " know this kind of input."
            )
        if self.state is None:
            return FrameSteps(lengths, prefix=prefix)
        return FrameSteps(lengths, self.state.steps, self.state.past, streams=True, prefix=prefix)

    def commit(self) -> None:
        """Store what the frames leave for those after them, once the whole call has succeeded."""
        if self.state is None or self.steps is None:
            return
        self.state.past = {i: tuple(map(keep, left)) for i, left in self.steps.left.items()}
        self.state.steps = self.steps.start + sum(self.steps.lengths)
