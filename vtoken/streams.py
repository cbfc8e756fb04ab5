"""Streams of frames: the state kept from one frame to the next, and reuse of earlier frames in the tower."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass
class FrameTokens:
    """Frames of streams and their reference frames, before the attention of one tower layer.

    Attributes:
        layer: the tower layer.
        keys: (frames, n, C) attention keys, bias included and before rotary embedding, heads side by side.
        reference: (frames, n, C) the keys of each frame's reference frame.
        prefix: tokens at the start that are no patch (CLS).
    """

    layer: int
    keys: Tensor
    reference: Tensor
    prefix: int = 0


@dataclass(frozen=True)
class Reuse:
    """Reuse of an earlier frame of the same stream inside a vision tower.

    A reference frame is computed in full. Of the frames after it, layer by layer, all keys and the chosen
    tokens are computed. The other tokens use the reference's values in the attention; instead of attending
    and passing the MLP, they add to their own hidden state what the reference's token added in this layer.

    Attributes:
        layers: the tower layers that reuse; the others are computed in full.
        interval: frames from one reference to the next; 1 is the plain tower.
        choose: `choose(FrameTokens) -> (frames, m) int64`, the tokens to compute, each once.
        shared: whether all of these layers use the choice of the first one.
    """

    layers: tuple[int, ...]
    interval: int
    choose: Callable[[FrameTokens], Tensor]
    shared: bool = False


@dataclass(frozen=True)
class PixelReuse:
    """Reuse of computed places for others, chosen on the pixels: these tokens pass no layer of the tower.

    A place is a patch, or the patches that a tower merges into one cell. The tokens of the computed places
    attend to all tokens of their frame. The keys, values and outputs of the others are those of a computed
    place of the same frame, or those with which their own place was computed last in an earlier frame.

    Attributes:
        interval: frames from one without a reference to the next: infinity for the first alone; 1 for methods
            that look at every frame by itself, which serve images outside of streams too.
        origins: `origins(pixels, reference) -> (rows, columns) int64`, of the pixels (rows, columns, patches,
            values) of all places in the units of the tower's input, and of those with which they were
            computed last, or None. Per place, the place of this frame, counted row by row, whose rows it
            takes: itself where it is computed, `EARLIER` for its own in the reference.
    """

    EARLIER: ClassVar[int] = -1

    interval: float
    origins: Callable[[Tensor, Tensor | None], Tensor]


@dataclass
class TowerUse:
    """Work of the tower for the frames of one call, in order.

    Attributes:
        tokens: per frame, tokens of the tower's sequence (CLS included).
        recomputed: per frame, tokens computed in a layer that reuses; all of them in a reference frame.
        shares: per frame (rows, columns) float32, the share of these layers in which a cell was computed.
        flops_dense, flops: FLOPs of the tower's layers, unpatched and as they ran (two per multiply-add).
    """

    tokens: list[int] = field(default_factory=list)
    recomputed: list[int] = field(default_factory=list)
    shares: list[Tensor] = field(default_factory=list, repr=False)
    flops_dense: float = 0.0
    flops: float = 0.0

    @property
    def references(self) -> int:
        """Frames that were computed in full."""
        return sum(a == b for a, b in zip(self.tokens, self.recomputed, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists of numbers, for JSON."""
        counts = {"tokens": self.tokens, "recomputed": self.recomputed}
        return counts | {"flops_dense": self.flops_dense, "flops": self.flops}


@dataclass
class References:
    """The last reference frame of a stream.

    Attributes:
        signature: grid, dtype and device; a frame is compared only with a reference of the same signature.
        age: frames since, 1 for the first frame after it.
        layers: per tower layer, keys (n, C), values (n, C), and the layer's addition to the hidden states
            (n, C). With `PixelReuse` rotated keys, values and outputs, of every token when it was computed
            last; of a layer that computes all tokens only the outputs.
        pixels: (rows, columns, patches, values) of every place when it was computed last, with `PixelReuse`.
    """

    signature: Hashable
    age: int
    layers: dict[int, tuple[Tensor, Tensor, Tensor]]
    pixels: Tensor | None = None


class StreamState:
    """State of one stream of frames between calls of a patched model; see `vtoken.stream`.

    Its size does not grow with the number of frames: a reference frame of the tower (`3 * layers * tokens *
    channels` elements), and the strategy's history. It can be pickled, and be on one model at a time.

    Attributes:
        memory: the strategy's own, see `VisualTokens.memory`.
        references: the tower's reference frame, None before the first.
        past: by tower layer, what the frames so far left for a strategy that attends across frames.
        steps: frames that such a strategy has read.
        frames: frames that the tower has read since the last reset.
        tokens, recomputed: their tokens in the tower, and the number of these that were computed.
        flops_dense, flops: FLOPs of the tower's layers, unpatched and as they ran.
        last: the latest call's part of these counts.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Delete all state: the next frame is the first of a new stream."""
        self.key: str | None = None
        self.memory: dict[str, Any] = {}
        self.references: References | None = None
        self.past: dict[int, tuple[Tensor, ...]] = {}
        self.steps = 0
        self.frames = self.tokens = self.recomputed = 0
        self.flops_dense = self.flops = 0.0
        self.last: TowerUse | None = None

    def bind(self, key: str) -> StreamState:
        """Delete the state of another patch than the one called `key`; returns itself."""
        if self.key != key:
            self.reset()
            self.key = key
        return self

    def add(self, use: TowerUse) -> None:
        """Add the tower's work for the latest frames to the counts."""
        self.last = use
        self.frames += len(use.tokens)
        self.tokens += sum(use.tokens)
        self.recomputed += sum(use.recomputed)
        self.flops_dense += use.flops_dense
        self.flops += use.flops

    def fork(self) -> StreamState:
        """A copy that continues from here: it shares tensors, which are never written, but not containers."""
        other = StreamState()
        memory = {k: list(v) if isinstance(v, list) else v for k, v in self.memory.items()}
        references = None if self.references is None else replace(self.references)
        other.__dict__.update(self.__getstate__(), memory=memory, references=references)
        return other

    def adopt(self, other: StreamState) -> None:
        """Continue from the state of `other`."""
        self.__dict__.update(other.__getstate__())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are kept."""
        kept = self.references
        return _nbytes([self.memory, self.past, None if kept is None else [kept.layers, kept.pixels]])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0


_streams: ContextVar[tuple[tuple[Any, StreamState], ...]] = ContextVar("vtoken_streams", default=())


def unwrapped(model: Any) -> Any:
    """The model inside its wrappers (`torch.compile`, distributed ones, `PeftModel`), or itself.

    A wrapper and the wrapped model are one model to vtoken.
    """
    while True:
        modules = getattr(model, "__dict__", {}).get("_modules", {})
        inside = [modules[n] for n in ("_orig_mod", "_fsdp_wrapped_module") if n in modules]
        if inside:  # torch.compile, FullyShardedDataParallel
            model = inside[0]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif callable(getattr(model, "get_base_model", None)):  # peft
            inner = model.get_base_model()
            if inner is model:
                return model
            model = inner
        else:
            return model


@contextmanager
def stream(model: Any, state: StreamState | None = None) -> Iterator[StreamState]:
    """Let visual input of `model` continue one stream within the block: images and frames of videos.

    Outside of it, every video of a call is a stream of its own that ends with the call, and images are not
    streams. Only the current context is affected: other threads and asynchronous tasks may feed other
    streams to the same model.

    Args:
        model: the model passed to `vtoken.patch`; without a patch the block has no effect.
        state: the stream so far, None for a new stream.

    Yields:
        The state.

    Raises:
        TypeError: if `state` is no StreamState.
        RuntimeError: if another thread is feeding this stream.
    """
    state = StreamState() if state is None else state
    if not isinstance(state, StreamState):
        raise TypeError(f"A stream's state is a vtoken.StreamState, found {type(state).__name__}.")
    if not state._lock.acquire(blocking=False):
        raise RuntimeError(
            "Another thread is feeding this stream: give every stream a vtoken.StreamState of its own."
        )
    token = _streams.set((*_streams.get(), (unwrapped(model), state)))
    try:
        yield state
    finally:
        _streams.reset(token)
        state._lock.release()


def current_stream(model: Any) -> StreamState | None:
    """The innermost open stream of a model, or of a module around it, in this context."""
    return next((state for owner, state in reversed(_streams.get()) if _holds(owner, model)), None)


def _holds(owner: Any, model: Any) -> bool:
    if owner is model:
        return True
    wraps = isinstance(owner, nn.Module) and not hasattr(owner, "base_model")  # no transformers model
    return wraps and any(part is model for part in owner.modules())


def keep(tensor: Tensor) -> Tensor:
    """A copy that outlives the call: without graph, usable inside and outside of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()
