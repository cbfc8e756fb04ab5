"""Attention across frames inside a vision tower.

An image that is read as a static video has more frames in the layers of the strategy than the tower's output
may have: the layers pass on the last of them, and the states of all go to the strategy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..adapters.towers.base import Tower
from ..adapters.towers.capture import Capture
from ..hooks import Wrapped, rebuilt
from ..temporal import FrameSteps, Temporal, TemporalPass


class TowerFrames:
    """The wrapped layers of one tower.

    Args:
        tower: with `tower.can_mix`.
        temporal: () -> the strategy's declaration.
        active: the capture of the running `get_*_features` call, if any.
    """

    def __init__(
        self, tower: Tower, temporal: Callable[[], Temporal], active: Callable[[], Capture | None]
    ) -> None:
        self.tower, self.temporal, self.active = tower, temporal, active
        self.prefix = int(tower.has_cls)
        self.first, self.last = min(temporal().layers), tower.info.feature_layer
        self.now: list[Any] = []
        self.wrapped = Wrapped()
        self._wrap()

    def _wrap(self) -> None:
        self.module, self.now = self.tower.module, self.tower.layers
        self.wrapped.remove()
        self.wrapped.wrap(self.module, "forward", self._tower)
        for i in range(self.first, self.last + 1):
            self.wrapped.wrap(self.now[i], "forward", functools.partial(self._layer, i))

    def refresh(self) -> None:
        """Look the layers up again."""
        now = [self.tower.module, *self.tower.layers]
        if any(a is not b for a, b in zip(now, [self.module, *self.now], strict=True)):
            self._wrap()

    def remove(self) -> None:
        self.wrapped.remove()

    def _running(self) -> TemporalPass | None:
        capture = self.active()
        return None if capture is None else capture.temporal

    def _tower(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self._running()
        if run is None:
            return original(*args, **kwargs)
        run.steps, run.layer = None, self.first
        # In the backward pass there is no call to which a layer belongs, so that layers are not checkpointed
        # from outside but in `_plain`.
        with unchecked(self.now[self.first : self.last + 1]) as checkpointed:
            run.checkpointed = checkpointed
            return original(*args, **kwargs)

    def _layer(self, i: int, original: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        run, capture = self._running(), self.active()
        if run is None or capture is None:
            return original(x, *args, **kwargs)
        temporal = self.temporal()
        if i == self.first:
            run.steps = run.begin(len(x), temporal.repeats, self.prefix)
            run.frames = x if run.lengths is not None else x.repeat_interleave(temporal.repeats, 0)
        if run.layer != i or run.frames is None or run.steps is None:
            raise rebuilt("The layers of the vision tower ran in another order")
        steps, frames = run.steps, run.frames
        mixes = i in temporal.layers
        if mixes and not temporal.between:
            frames = temporal.mix(i, frames, steps)
        if mixes and temporal.between:
            out: Any = self._between(i, frames, temporal, steps, args, kwargs)
        else:
            out = self._plain(self.now[i], original, frames, run.checkpointed, args, kwargs)
        frames = out[0] if isinstance(out, tuple) else out
        run.frames, run.layer = (frames, i + 1) if i < self.last else (None, -1)
        if i in capture.needs.states:
            count = 1 if run.lengths is not None else temporal.repeats
            capture.add("states", i, self.tower.maps(frames.unflatten(0, (-1, count))))
        if run.lengths is None:
            frames = frames[temporal.repeats - 1 :: temporal.repeats]
        return (frames, *out[1:]) if isinstance(out, tuple) else frames

    @staticmethod
    def _plain(
        layer: Any,
        original: Callable[..., Any],
        x: Tensor,
        checkpointed: bool,
        args: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        if not (layer.training and checkpointed):
            return original(x, *args, **kwargs)

        def again(x: Tensor, *args: Any) -> Any:
            with unchecked([layer]):  # also when it is computed again
                return original(x, *args, **kwargs)

        return layer._gradient_checkpointing_func(again, x, *args)

    def _between(
        self, i: int, x: Tensor, temporal: Temporal, steps: FrameSteps, args: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """One layer, with the strategy's attention between its own attention and its MLP."""
        layer = self.tower.split_layers()[i]
        heads = layer.heads(x, layer.arguments(args, kwargs))
        x = x + layer.mixed(heads.attend(layer.scale, None, layer.attention_dropout), heads)
        x = temporal.mix(i, x, steps)
        return x + layer.mlp(x)


@contextmanager
def unchecked(layers: list[Any]) -> Iterator[bool]:
    """Turn the gradient checkpointing of layers off for a while; yields whether any had it on."""
    on = [layer for layer in layers if getattr(layer, "gradient_checkpointing", False)]
    for layer in on:
        layer.gradient_checkpointing = False
    try:
        yield bool(on)
    finally:
        for layer in on:
            layer.gradient_checkpointing = True
