"""Helpers of the live-source tests: a server on the loopback, and reading a source to its end."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from tests.video.media import in_time
from tests.video.test_live import ascending
from vtoken.video import Frame, LiveReader

BITSTREAM = dict(
    group=8, options={"tune": "zerolatency"}, between=0
)  # every picture can be shown as soon as it is there


def later(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@contextmanager
def serving(answer: Callable[[socket.socket, int], None]) -> Iterator[int]:
    """A TCP server that gives each connection, with its number, to `answer`, at the same time; yields its
    port.
    """
    over = threading.Event()

    def one(connection: socket.socket, count: int) -> None:
        with connection, suppress(OSError):
            answer(connection, count)

    with socket.create_server(("127.0.0.1", 0)) as server:

        def work() -> None:
            for count in itertools.count():
                connection, _ = server.accept()
                if over.is_set():
                    return connection.close()
                later(partial(one, connection, count))

        thread, port = later(work), server.getsockname()[1]
        try:
            yield port
        finally:
            over.set()
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join(10)


def read_all(source, **how) -> tuple[list[Frame], LiveReader]:
    live = LiveReader(source, drop=False, **{"timeout": 10, **how})

    def work() -> list[Frame]:
        with live:
            return list(live)

    got = in_time(work, 60)
    ascending(got)
    return got, live
