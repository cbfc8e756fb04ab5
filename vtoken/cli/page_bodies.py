"""Bodies of requests: their stated length, the time in which they come, and a second reading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

MAX_DRAINED = 2**20
DIGITS = 15  # of a length
PATIENCE = 30.0  # seconds for a body to come, and one more for each `SLOWEST` bytes of it
SLOWEST = 2**16


def stated_length(headers: dict[str, str]) -> int | None:
    """Bytes of a request's body; None if it is of unknown length.

    Args:
        headers: with names in lower case.
    """
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers:  # which says where the body ends, whatever length stands beside it
        return None
    return int(length) if length.isascii() and length.isdigit() and len(length) <= DIGITS else None


def in_time(receive: Callable[..., Any], length: int) -> Callable[..., Any]:
    """A `receive` for which the client has gone if the body is too slow."""
    end, whole = time.monotonic() + PATIENCE + length / SLOWEST, False

    async def within() -> Any:
        nonlocal whole
        if whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
        except asyncio.TimeoutError:
            message = {"type": "http.disconnect"}
        whole = not message.get("more_body", False)
        return message

    return within


async def drain(receive: Callable[..., Any]) -> None:
    """Read a small body to its end: a client that still writes at the close does not read the answer."""
    taken, more = 0, True
    while more and taken <= MAX_DRAINED:
        message = await receive()
        taken += len(message.get("body", b""))
        more = message.get("more_body", False)


async def body_of(receive: Callable[..., Any]) -> bytes:
    """The body of a request, which the server ends at its stated length."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def again(body: bytes, receive: Callable[..., Any]) -> Callable[..., Any]:
    """A `receive` that first gives a body that was read already, then continues with the connection."""
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Any:
        return given.pop() if given else await receive()

    return next_message
