"""Times of the stages of a model's calls.

A call is split without gaps: every moment belongs to the vision tower, to vtoken (all its hooks: scoring,
selection, gathering), to the LLM, or to the rest. On a GPU the bounds are CUDA events on the model's stream.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .recorder import Stopwatch

PHASES = ("tower", "choose", "llm", "rest")
Times = dict[str, float]


def now(device: torch.device, clock: str = "wall") -> Any:
    """A point in time: "wall" on the device's own clock, "cpu" for the processor time of this process."""
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


@contextmanager
def phases(model: Any, clock: str = "wall", steps: str = "llm") -> Iterator[Phases]:
    """Time the phases of a model's calls inside the block, patched or not; the model is left as it was.

    Args:
        steps: the phase of the LLM's forwards after the first one.
    """
    watch, undo = Phases(model.device, clock), []
    base, decoder = model.base_model, model.get_decoder()
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in [*hooks.items()]:
                if _ours(hook):
                    hooks[key] = watch.during("choose", hook)
                    undo.append(functools.partial(hooks.__setitem__, key, hook))
    for name in ("get_image_features", "get_video_features"):
        if hasattr(base, name):
            was, current = base.__dict__.get(name), getattr(base, name)
            timed = watch.during("tower", current if was is None else was.original)
            if was is not None:  # vtoken's own part around the model's method
                part = functools.partial(watch.during("choose", was.instead), timed)
                timed = functools.update_wrapper(part, current)
            base.__dict__[name] = timed
            undo.append(functools.partial(_restore, base, name, was))
    before: list[str] = []
    names = itertools.chain(["llm"], itertools.repeat(steps))
    begin = decoder.register_forward_pre_hook(
        lambda *_: before.append(watch.switch(next(names))), prepend=True
    )
    end = decoder.register_forward_hook(lambda *_: watch.switch(before.pop()) and None)
    undo += [begin.remove, end.remove]
    try:
        yield watch
    finally:
        for step in undo:
            step()


def _restore(owner: Any, name: str, was: Any) -> None:
    if was is None:
        owner.__dict__.pop(name, None)
    else:
        owner.__dict__[name] = was
