"""The visitors of a page: what each browser has there, for a bounded number of browsers at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

MAX_QUESTION = 500  # characters


class Held(Protocol):
    """What one browser has on a page.

    Attributes:
        touched: `time.monotonic()` of its latest request.
    """

    touched: float

    def close(self) -> Any:
        """Free it when its browser has left."""


D = TypeVar("D", bound=Held)


class Desks(Generic[D]):
    """One desk per browser, with a bounded number of browsers at a time.

    Args:
        make: function that makes one.
        most: largest number of browsers at a time.
        idle: seconds without a request after which a desk is freed, for browsers that left without notice.
    """

    def __init__(self, make: Callable[[], D], most: int = 4, idle: float = 300.0) -> None:
        self.make, self.most, self.idle = make, most, idle
        self._desks: dict[str, D] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        threading.Thread(target=self._watch, name="vtoken-desks", daemon=True).start()

    def __len__(self) -> int:
        return len(self._desks)

    def of(self, browser: str | None) -> D | None:
        """A browser's desk if it has one."""
        desk = self._desks.get(browser or "")
        if desk is not None:
            desk.touched = time.monotonic()
        return desk

    def open(self, browser: str | None) -> D:
        """A browser's desk, a new one if there is room. Raises ValueError if full or without a browser."""
        if not browser:
            raise ValueError("Open the page first: a request needs its session.")
        with self._lock:
            if browser not in self._desks:
                if self._ended.is_set() or len(self._desks) >= self.most:
                    raise ValueError(
                        f"All {self.most} places are taken: try again when another browser has left."
                    )
                self._desks[browser] = self.make()
            return self.of(browser)  # type: ignore[return-value]

    def leave(self, browser: str | None) -> None:
        """Forget a browser's stream."""
        with self._lock:
            desk = self._desks.pop(browser or "", None)
        if desk is not None:
            desk.close()

    def close(self) -> None:
        """Close all desks and accept no new ones."""
        self._ended.set()
        for browser in list(self._desks):
            self.leave(browser)

    def _watch(self) -> None:
        while not self._ended.wait(min(self.idle, 10.0)):
            for browser, desk in list(self._desks.items()):
                if time.monotonic() - desk.touched > self.idle:
                    self.leave(browser)
