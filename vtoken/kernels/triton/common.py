"""Helpers shared by the launchers.

Counts of tokens, rows and heads are not specialised in any kernel: a new prompt length must not cost a
compilation.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from ..dispatch import interpreting


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def wide(x: Tensor) -> bool:
    """Whether tl.dot gets float32 operands: the interpreter cannot multiply bfloat16."""
    return x.dtype == torch.float32 or interpreting()
