"""Pipes and growing files, read with a time-out and a way to stop."""

from __future__ import annotations

import os
import select
import stat
import threading
import time
from typing import Any

_POLL = 0.05  # seconds after which a blocked read looks whether it is to stop


class Stopped(Exception):
    """The reader was closed while it waited for data."""


class Waiting:
    """A binary stream without `seek`, for libav: `read(n)` waits for data.

    A file that grows ends when nothing has been added for `timeout` seconds; one that shrinks is read from
    its start again. A pipe ends when its writer closes it, and one that stays silent for `timeout` seconds
    raises TimeoutError.

    Args:
        file: path of a regular file or named pipe, or a file descriptor or object that has one (which stays
            open).
        timeout: seconds.
        stop: set to end a read that waits, which then raises `Stopped`.
    """

    def __init__(self, file: Any, timeout: float, stop: threading.Event | None = None):
        self._file = file  # an object that nobody holds would close its descriptor
        self.timeout, self._stop = timeout, stop or threading.Event()
        self._fd, self._owned = -1, isinstance(file, str)
        if self._owned:
            # without O_NONBLOCK, opening a pipe waits for its writer for ever
            self._fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        else:
            self._fd = file if isinstance(file, int) else file.fileno()
        self._grows = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._over = False
        self._written = not self._owned  # a pipe without a writer yet reads as ended

    def read(self, n: int) -> bytes:
        deadline = time.monotonic() + self.timeout
        while not self._over:
            if self._stop.is_set():
                raise Stopped
            data = self._now(n)
            if data:
                self._written = True
                return data
            if data == b"" and self._written and not self._grows:
                return b""
            if time.monotonic() > deadline:
                if self._grows:
                    self._over = True  # libav asks more than once before it takes an end for the end
                    return b""
                raise TimeoutError(f"no data within {self.timeout:g} s")
            if data is not None:
                self._stop.wait(_POLL)
        return b""

    def close(self) -> None:
        if self._owned and self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __del__(self) -> None:
        self.close()

    def _now(self, n: int) -> bytes | None:
        """Data available at once: b"" at an end, None after a while without any."""
        if self._grows:
            if os.fstat(self._fd).st_size < os.lseek(self._fd, 0, os.SEEK_CUR):
                os.lseek(self._fd, 0, os.SEEK_SET)
        else:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            if not poll.poll(_POLL * 1000):
                return None
        try:
            return os.read(self._fd, n)
        except BlockingIOError:
            return None


def over_pipe(file: Any) -> bool:
    """Whether a file object reads from a pipe or socket."""
    try:
        mode = os.fstat(file.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
