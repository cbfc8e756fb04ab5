"""Frames of running calls on this thread's stack: is a `generate` or a forward of a model among them."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

FORWARD = nn.Module._call_impl.__code__


def living_threads() -> list[int]:
    """The ids of the threads that are alive."""
    return [t.ident for t in threading.enumerate() if t.ident is not None]


# Of this thread only: the stack of a running thread changes while it is read.
def frame_of(code: CodeType | None, owner: Any) -> FrameType | None:
    """The outermost frame of a method with this code on this object."""
    frame, found = sys._getframe(), None
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is owner:
            found = frame
        frame = frame.f_back  # type: ignore[assignment]
    return found


def generate_frame(model: Any) -> FrameType | None:
    """The frame of a running `generate` of this model."""
    function = getattr(type(model), "generate", None)
    code = None if function is None else getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else frame_of(code, model)


def labels_given(model: Any, input_ids: Tensor | None) -> Tensor | None:
    """The `labels` of a running function of this model that was given these `input_ids` too.

    A forward of another package in place of the model's own keeps them for a loss of its own. None if there
    is none, or if they are no token ids.
    """
    frame = sys._getframe(1) if input_ids is not None else None
    while frame is not None:
        code = frame.f_code
        if "labels" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            found = frame.f_locals
            if found.get("self") is model and _holds(found, input_ids):
                labels = found.get("labels")
                ids = isinstance(labels, Tensor) and not labels.is_floating_point()
                return labels if ids else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _holds(found: dict[str, Any], input_ids: Any) -> bool:
    """Whether one of the locals is this object, or a mapping or sequence with it."""
    for value in found.values():
        inner = (
            value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
        )
        if value is input_ids or any(each is input_ids for each in inner):
            return True
    return False


def in_forward(base: Any) -> bool:
    """Whether this thread is inside a forward of this module."""
    return frame_of(FORWARD, base) is not None
