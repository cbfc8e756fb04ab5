"""Times of the stages of a model's calls.

A call is split without gaps: every moment belongs to the vision tower, to vtoken (all its hooks: scoring,
selection, gathering), to the LLM, or to the rest. On a GPU the bounds are CUDA events on the model's stream.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .hooks import Method
from .recorder import Stopwatch

PHASES = ("tower", "choose", "llm", "rest")
Times = dict[str, float]


def now(device: torch.device | None, clock: str = "wall") -> Any:
    """A point in time: "wall" on the device's own clock, "cpu" for the processor time of this process.

    Args:
        device: None for the host.
    """
    return time.process_time() if clock == "cpu" else Stopwatch.mark(device)


class Phases:
    """The current phase of a call; `seconds()` adds up the time of each."""

    def __init__(self, device: torch.device, clock: str = "wall") -> None:
        self.device, self.clock = device, clock
        self.marks: list[tuple[str, Any]] = [("rest", now(device, clock))]

    def switch(self, phase: str) -> str:
        """Begin a phase and return the one before."""
        before = self.marks[-1][0]
        self.marks.append((phase, now(self.device, self.clock)))
        return before

    def during(self, phase: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.switch(phase)
            try:
                return fn(*args, **kwargs)
            finally:
                self.switch(before)

        return call

    def seconds(self) -> Times:
        """Per phase, and "total"; ends the measurement and waits for the device."""
        self.switch("end")
        watch = Stopwatch()
        for (phase, start), (_, end) in zip(self.marks, self.marks[1:]):
            watch.add(phase, start, end)
        watch.add("total", self.marks[0][1], self.marks[-1][1])
        return dict.fromkeys(PHASES, 0.0) | watch.seconds()


def _ours(hook: Any) -> bool:
    return (getattr(getattr(hook, "func", hook), "__module__", None) or "").startswith("vtoken.")


_timed: weakref.WeakSet[Any] = weakref.WeakSet()  # the decoders of models inside of `phases`
_lock = threading.Lock()


@contextmanager
def phases(model: Any, clock: str = "wall", steps: str = "llm") -> Iterator[Phases]:
    """Time the phases of a model's calls inside the block, patched or not; the model is left as it was.

    Args:
        steps: the phase of the LLM's forwards after the first one.

    Raises:
        RuntimeError: the model is timed already, in this thread or another one.
    """
    decoder = model.get_decoder()
    with _lock:
        if decoder in _timed:
            raise RuntimeError(
                f"This {type(model).__name__} is already timed, by vtoken.answer or another block: make one"
                " call at a time, or give every thread a model of its own."
            )
        _timed.add(decoder)
    watch, undo = Phases(model.device, clock), ExitStack()
    undo.callback(_timed.discard, decoder)
    with undo:
        _time_hooks(model, watch, undo)
        _time_towers(model.base_model, watch, undo)
        _time_decoder(decoder, watch, steps, undo)
        yield watch


def _time_hooks(model: Any, watch: Phases, undo: ExitStack) -> None:
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in [*hooks.items()]:
                if _ours(hook):
                    hooks[key] = timed = watch.during("choose", hook)
                    undo.callback(_put_back, hooks, key, timed, hook)


def _time_towers(base: Any, watch: Phases, undo: ExitStack) -> None:
    for name in ("get_image_features", "get_video_features"):
        if hasattr(base, name):
            was, current = base.__dict__.get(name), getattr(base, name)
            patched = isinstance(was, Method) and was.instead is not None
            timed = watch.during("tower", was.original if patched else current)
            if patched:  # vtoken's own part around the model's method
                part = functools.partial(watch.during("choose", was.instead), timed)
                timed = functools.update_wrapper(part, current)
            base.__dict__[name] = timed
            undo.callback(_put_back, base.__dict__, name, timed, was)


def _time_decoder(decoder: Any, watch: Phases, steps: str, undo: ExitStack) -> None:
    before: list[str] = []
    names = itertools.chain(["llm"], itertools.repeat(steps))
    begin = decoder.register_forward_pre_hook(
        lambda *_: before.append(watch.switch(next(names))), prepend=True
    )
    end = decoder.register_forward_hook(lambda *_: watch.switch(before.pop()) and None)
    undo.callback(begin.remove)
    undo.callback(end.remove)


def _put_back(owner: Any, key: Any, timed: Any, was: Any) -> None:
    """Undo a replacement, unless others have removed or replaced it since."""
    if owner.get(key) is not timed:
        return
    while isinstance(was, Method) and was.instead is None:  # unpatched since
        was = was.before
    if was is None:
        del owner[key]
    else:
        owner[key] = was
