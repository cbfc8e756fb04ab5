"""A queue of frames between two threads, bounded in frames and bytes."""

from __future__ import annotations

import threading
from collections import deque

from .frame import Frame


class Buffer:
    """Frames that wait to be taken, oldest first.

    Args:
        frames: how many may wait.
        size: bytes that all of them together may have; one may wait however large it is.
        drop: whether a frame without room throws out the oldest; or else it waits for room.
    """

    def __init__(self, frames: int, size: int, drop: bool):
        self.dropped = 0
        self._frames, self._size, self._drop = frames, size, drop
        self._waiting: deque[Frame] = deque()
        self._bytes, self._shut = 0, False
        self._change = threading.Condition()

    def put(self, frame: Frame) -> None:
        """Add the newest frame. After `shut`, nothing is added."""
        with self._change:
            if not self._drop:
                self._change.wait_for(lambda: self._shut or self._room(frame))
            while self._waiting and not self._room(frame):
                self._pop()
                self.dropped += 1
            if not self._shut:
                self._waiting.append(frame)
                self._bytes += frame.image.nbytes
            self._change.notify_all()

    def take(self, timeout: float | None = None, newest: bool = False) -> Frame | None:
        """The oldest frame, or the newest one (older ones are dropped); None at a time-out or at the end."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._shut, timeout)
            while newest and len(self._waiting) > 1:
                self._pop()
                self.dropped += 1
            frame = self._pop() if self._waiting else None
            self._change.notify_all()
            return frame

    def shut(self, forget: bool = False) -> None:
        """Accept no more frames; with `forget` drop those that wait, too."""
        with self._change:
            self._shut = True
            if forget:
                self._waiting.clear()
                self._bytes = 0
            self._change.notify_all()

    @property
    def ended(self) -> bool:
        """Whether no frame waits and none will come."""
        with self._change:
            return self._shut and not self._waiting

    def _room(self, frame: Frame) -> bool:
        fits = self._bytes + frame.image.nbytes <= self._size or not self._waiting
        return len(self._waiting) < self._frames and fits

    def _pop(self) -> Frame:
        frame = self._waiting.popleft()
        self._bytes -= frame.image.nbytes
        return frame
