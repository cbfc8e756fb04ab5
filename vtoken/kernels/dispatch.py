"""Choice of the backend: Triton or plain torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_default = "auto"
_override: ContextVar[str | None] = ContextVar("vtoken_kernel_backend", default=None)


@cache
def triton_available() -> bool:
    """Whether the triton package is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"Unknown kernel backend {name!r}: choose one of {', '.join(BACKENDS)}.")
    if name == "triton" and not triton_available():
        raise RuntimeError("The triton backend needs the triton package, which is not installed: use 'auto'.")
    return name


def set_backend(name: str) -> None:
    """Choose this process's kernels: "triton", "torch" or "auto" (Triton on CUDA tensors, torch elsewhere).

    Raises:
        ValueError: for another name.
        RuntimeError: for "triton" if the triton package is not installed.
    """
    global _default
    _default = _check(name)


def get_backend() -> str:
    """The backend in force here: "auto", "triton" or "torch"."""
    return _override.get() or _default


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use a backend inside a `with` block, in this thread only. Raises as `set_backend` does."""
    token = _override.set(_check(name))
    try:
        yield
    finally:
        _override.reset(token)


def use_triton(x: Tensor, *, any_dtype: bool = False) -> bool:
    """Whether an op on `x` uses Triton; float64 always stays with torch."""
    chosen = get_backend()
    if chosen == "torch" or not (any_dtype or x.dtype in TRITON_DTYPES):
        return False
    if x.device.type == "cuda":
        return triton_available()
    if chosen == "triton" and not (x.device.type == "cpu" and interpreting()):
        raise RuntimeError(
            f"The triton backend cannot run on a {x.device.type} tensor: move it to a CUDA device, use"
            " 'auto', or set TRITON_INTERPRET=1 before triton is imported to interpret the kernels on the"
            " CPU."
        )
    return chosen == "triton"
