"""The page of `vtoken demo explore` on a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.cli.serving import running
from vtoken import tiny
from vtoken.cli.explore_html import CSS
from vtoken.cli.explore_inputs import examples
from vtoken.cli.explore_page import Visit, build_page
from vtoken.cli.explore_state import Explorer
from vtoken.cli.page_server import Service, listen, private_folder
from vtoken.cli.page_visitors import Desks

NAME = "qwen2_5_vl"


def explorer(**options: Any) -> Explorer:
    """Of the tiny model that reads pictures and clips."""
    return Explorer(*tiny.load(NAME), tiny=True, **options)


@contextmanager
def served(made: Explorer, room: int = 0, most: int = 2) -> Iterator[Any]:
    """A `Service` with `.desks`, `.folder`, `.page` and `.subjects`; `room` are the bytes of uploads."""
    subjects = examples(NAME, made.processor)
    desks = Desks(lambda: Visit(made), most)
    with listen("127.0.0.1") as listening, private_folder() as folder:
        page = build_page(made, desks, subjects, strategies=["divprune", "fastv"], allow_uploads=bool(room))
        uploads = folder if room else None
        service = Service(page, listening, uploads=uploads, max_upload=room, css=CSS)
        service.folder, service.page, service.subjects = folder, page, subjects
        with running(service, desks):
            yield service
