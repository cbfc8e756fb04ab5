"""Sessions that answer questions about a running stream of frames; see docs/streaming.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import Answer, AnswerStream
    from .memory import RecentMemory, Step
    from .rekv import Block, ReKVMemory
    from .session import StreamSession

__all__ = ["Answer", "AnswerStream", "Block", "ReKVMemory", "RecentMemory", "Step", "StreamSession"]

# torch is imported when one of these is used, not by `vtoken demo stream --help`
_LAZY = {
    "Answer": "answers",
    "AnswerStream": "answers",
    "Block": "rekv",
    "ReKVMemory": "rekv",
    "RecentMemory": "memory",
    "Step": "memory",
    "StreamSession": "session",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
