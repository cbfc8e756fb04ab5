"""A page on a real socket, and visitors that speak its protocol as a browser does."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx

from tests.streaming.common import model_of, processor_of
from vtoken.cli.page_server import Service, listen, private_folder
from vtoken.cli.page_visitors import Desks
from vtoken.cli.stream import make_session
from vtoken.cli.stream_page import CSS, build_page
from vtoken.cli.stream_visitors import Desk

NAME = "qwen2_5_vl"
SOURCE = "synthetic://3?fps=2&frames=9"


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


@contextmanager
def served(
    host: str = "127.0.0.1",
    most: int = 2,
    room: int = 0,
    speed: float = 200.0,
    source: str = SOURCE,
    **options: Any,
) -> Iterator[Any]:
    """A `Service` with `.desks`, `.folder` and `.make`; `room` are the bytes of uploads, which come with
    other sources.
    """
    make = partial(make_session, model_of(NAME), processor_of(NAME), max_steps=4)
    desks = Desks(lambda: Desk(make, speed=speed), most)
    with listen(host) as listening, private_folder() as folder:
        page = build_page(
            desks, ["none", "stc_pruner"], source, allow_sources=bool(room), examples=["what ?"]
        )
        uploads = folder if room else None
        service = Service(page, listening, host, uploads=uploads, max_upload=room, css=CSS, **options)
        service.folder, service.page = folder, page
        with running(service, desks):
            yield service


@contextmanager
def running(service: Service, desks: Desks[Any]) -> Iterator[None]:
    """Serve in the block, with the service's `.desks`; both are ended after it."""
    service.desks = desks
    service.start()
    try:
        yield
    finally:
        service.stop()
        desks.close()


class Visitor:
    """A browser with the page open: a cookie jar, a session, and the heartbeat that ends when it leaves."""

    def __init__(self, service: Any) -> None:
        self.service, self.session = service, secrets.token_hex(8)
        self.base = service.url.partition("?")[0]
        self.http = httpx.Client(base_url=self.base, timeout=60, follow_redirects=True, trust_env=False)
        self.opened = self.http.get(service.url)
        self.events = {fn.name: number for number, fn in service.page.fns.items()}

    def press(self, name: str, *data: Any) -> Any:
        """What the event's last message carries."""
        body = {"fn_index": self.events[name], "data": list(data), "session_hash": self.session}
        joined = self.http.post("gradio_api/queue/join", json=body)
        joined.raise_for_status()
        with self.http.stream(
            "GET", "gradio_api/queue/data", params={"session_hash": self.session}
        ) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    return message["output"].get("data", message["output"])
        raise AssertionError("the event never ended")

    def play(self, source: str = "", strategy: str = "none", budget: float = 0.5, fps: float = 2.0) -> str:
        """The status line."""
        return self.press("play", source, strategy, budget, fps)[0]

    def look(self) -> list[Any]:
        return self.press("look")

    @contextmanager
    def here(self) -> Iterator[None]:
        """The heartbeat, until the block ends."""
        with (
            httpx.Client(base_url=self.base, timeout=60, trust_env=False, cookies=self.http.cookies) as other,
            other.stream("GET", f"gradio_api/heartbeat/{self.session}") as beats,
        ):
            lines = beats.iter_lines()  # a generator that goes ends the request
            next(lines)
            yield
