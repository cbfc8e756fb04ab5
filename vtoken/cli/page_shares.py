"""One visitor's share of what all visitors of a page use: its queue, its messages and its connections."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

MAX_PENDING = 16  # events of one browser that wait or run
MAX_UNREAD = 128  # messages to one browser that it has not read
MAX_IDLE = 32  # sessions of one address without an event or a reader that keep their messages
MAX_NAME = 64  # characters of a session's name


class Events:
    """What the queue of a page holds for each session.

    Args:
        queue: of a `gradio.Blocks`.
    """

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        # gradio drops the oldest of 2000, and its queue ends for all where an event of that one still waits
        queue.pending_messages_per_session.max_size = math.inf

    def pending(self, session: str) -> int:
        """Number of a session's events that wait or run.

        gradio's own count per session never forgets the events of a browser that left before its answer came.
        """
        waiting = (e for part in self.queue.event_queue_per_concurrency_id.values() for e in part.queue)
        running = (event for job in self.queue.active_jobs if job for event in job)
        return sum(event.session_hash == session for event in chain(waiting, running))

    def unread(self, session: str) -> int:
        """Number of messages, answers among them, that the browser has not read."""
        messages = self.queue.pending_messages_per_session.get(session)
        return 0 if messages is None else messages.qsize()

    def forget(self, session: str) -> None:
        """Drop the messages to a session of which no event waits or runs."""
        self.queue.pending_messages_per_session.pop(session, None)
        self.queue.pending_event_ids_session.pop(session, None)


class Shares:
    """Limits on one visitor's share of the queue, of the messages and of the connections.

    Args:
        pending: tells how many events of a session wait or run.
        queue: events that one address may have waiting or running, whatever number of sessions it says it
            has.
        unread: tells how many messages to a session are not read.
        forget: drops them.

    Attributes:
        open: requests of each address that are not answered yet.
        read: readers of each session's messages.
    """

    def __init__(
        self,
        pending: Callable[[str], int],
        queue: int,
        unread: Callable[[str], int] = lambda session: 0,
        forget: Callable[[str], None] = lambda session: None,
    ) -> None:
        self.pending, self.queue, self.unread, self.forget = pending, queue, unread, forget
        self.open: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self._sessions: dict[str, dict[str, None]] = {}  # of each address, the latest last

    def takes_too_much(self, address: str, body: bytes) -> bool:
        """Whether this event exceeds the limit of its session or address; counts it if not."""
        session = session_of(body)
        if session is None:
            return False  # gradio refuses it
        held = self._sessions.pop(address, {})
        waits = {name: self.pending(name) for name in held}
        idle = [name for name in held if not (waits[name] or self.read[name] or name == session)]
        for name in idle[: max(0, len(idle) - MAX_IDLE)]:
            self.forget(name)
            del held[name]
        full = (
            self.pending(session) >= MAX_PENDING
            or self.unread(session) >= MAX_UNREAD
            or sum(waits.values()) >= self.queue
        )
        if not full:
            held.pop(session, None)
            held[session] = None
        if held:
            self._sessions[address] = held
        return full


def session_of(body: bytes) -> str | None:
    """The session that an event names, None if there is none."""
    try:
        session = json.loads(body)["session_hash"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return session if isinstance(session, str) else None
