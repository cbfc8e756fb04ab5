"""Questions about a stream of frames that is still running; see docs/streaming.md."""

from __future__ import annotations

from .answers import Answer, AnswerStream
from .memory import RecentMemory, Step
from .rekv import Block, ReKVMemory
from .session import StreamSession

__all__ = ["Answer", "AnswerStream", "Block", "ReKVMemory", "RecentMemory", "Step", "StreamSession"]
