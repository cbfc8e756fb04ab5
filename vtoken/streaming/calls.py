"""A lock that counts calls in several threads, and lets an owner wait until there are none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Calls:
    """Many calls at a time, or one owner alone: a lock for readers and writers; a waiting owner goes first.

    A call may begin in one thread (`enter`) and end in another (`leave`); `within` marks a thread that works
    for it.
    """

    def __init__(self) -> None:
        self._change = threading.Condition(threading.RLock())
        self._count = self._waiting = 0
        self._working: list[int] = []

    def enter(self) -> None:
        """Begin a call, after the turn of the owner if there is one."""
        me = threading.get_ident()
        with self._change:
            self._change.wait_for(lambda: not self._waiting or me in self._working)
            self._count += 1

    def leave(self) -> None:
        with self._change:
            self._count -= 1
            self._change.notify_all()

    @contextmanager
    def within(self) -> Iterator[None]:
        """Mark this thread as working for a call that has begun."""
        me = threading.get_ident()
        with self._change:
            self._working.append(me)
        try:
            yield
        finally:
            with self._change:
                self._working.remove(me)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Make a call from its beginning to its end."""
        self.enter()
        try:
            with self.within():
                yield
        finally:
            self.leave()

    @contextmanager
    def alone(self, action: str) -> Iterator[None]:
        """Wait for the end of all calls, and let none begin within the block.

        Raises:
            RuntimeError: if the calling thread works for one of the calls, which would wait for itself; the
                message names `action`.
        """
        with self._change:
            if threading.get_ident() in self._working:
                raise RuntimeError(
                    f"A StreamSession cannot {action} from within one of its own answers: do so after it."
                )
            self._waiting += 1
            try:
                self._change.wait_for(lambda: not self._count)
                yield
            finally:
                self._waiting -= 1
                self._change.notify_all()
