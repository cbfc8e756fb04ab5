"""The command `vtoken demo stream`: questions to a stream, in a browser or at a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ..extras import require
from .options import SYNTHETIC, Budget, Command, console, fail, page_options

if TYPE_CHECKING:
    from ..streaming.session import StreamSession

TINY = "qwen2_5_vl"
# of two frames each, which the tiny model remembers: it has learnt from windows of 2 to 10 frames
TINY_STEPS = 4
STRATEGIES = ("stc_pruner", "stc", "stc_cacher", "none")
EXAMPLES = (
    "which digit is shown now?",
    "which shape is shown now?",
    "how many digits were shown?",
    "was there a star?",
    "was there a 7?",
)
SESSIONS = 4  # browsers at a time
PAGE_BYTES = 256 * 2**20  # of the memories of all of them
SOURCES = "Warning: visitors may open files, addresses and cameras of this machine."


@click.command("stream", cls=Command)
@click.option(
    "--source", default=SYNTHETIC, show_default=True, help="File, rtsp/http address, camera number."
)
@click.option(
    "--model", "model_id", help="Hub id or folder of a model that reads videos; default: a shipped tiny one."
)
@click.option(
    "--strategy", default=STRATEGIES[0], show_default=True, help="A strategy that fits streams, or none."
)
@click.option(
    "--budget", type=Budget(), default="0.5", show_default=True, help="Share of the visual tokens to keep."
)
@click.option("--fps", type=click.FloatRange(min=0, min_open=True), default=2.0, show_default=True)
@click.option(
    "--speed",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of recordings.",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Visual tokens that the session remembers at most."
)
@click.option("--terminal", is_flag=True, help="No page: type questions here.")
@click.option(
    "--ask", "questions", type=(float, str), multiple=True, help="SECONDS QUESTION; may be repeated."
)
@page_options
@click.option(
    "--sessions", type=click.IntRange(min=1), default=SESSIONS, show_default=True, help="Browsers at a time."
)
@click.option(
    "--allow-sources", is_flag=True, help="Visitors may open files, addresses and cameras of this machine."
)
def stream_command(**options: Any) -> None:
    """Play a file, a camera, an address or a synthetic stream, and ask about it while it runs."""
    try:
        run(**options)
    except (ValueError, OSError, ImportError) as error:
        raise fail(error) from None


def run(
    source: str,
    model_id: str | None,
    strategy: str,
    budget: float | int,
    fps: float,
    speed: float,
    max_tokens: int | None,
    terminal: bool,
    questions: tuple[tuple[float, str], ...],
    **serving: Any,
) -> None:
    for seconds, question in questions:
        if not (math.isfinite(seconds) and seconds >= 0 and question.strip()):
            found = f"{seconds} {question!r}"
            raise ValueError(
                f"--ask takes a time from 0 on and a question, such as --ask 3 'who?', found {found}."
            )
    if not questions and not terminal:
        require("gradio", extra="stream")
    if not source.startswith("synthetic:"):
        require("av", extra="stream")
    from ..asking import load

    bounds: dict[str, Any] = {"max_tokens": max_tokens, "max_steps": TINY_STEPS if model_id is None else None}
    name: str | int = int(source) if source.isdecimal() else source
    if not (questions or terminal):
        show_page(model_id, source, strategy, budget, fps, speed, bounds, **serving)
        return
    model, processor = load(model_id, TINY)
    make: Callable[[str, float | int], StreamSession] = partial(make_session, model, processor, **bounds)
    if questions:
        from ..video import LiveReader
        from .stream_terminal import recite

        with make(strategy, budget) as session, LiveReader(name, fps=fps, speed=None, drop=False) as frames:
            recite(console(), session, frames, questions)
    else:
        from .stream_player import Player
        from .stream_terminal import converse

        with make(strategy, budget) as session, Player(session, name, fps, speed) as player:
            converse(console(), player)


def show_page(
    model_id: str | None,
    source: str,
    strategy: str,
    budget: float | int,
    fps: float,
    speed: float,
    bounds: dict[str, Any],
    host: str,
    port: int | None,
    hosts: tuple[str, ...],
    sessions: int,
    allow_sources: bool,
    show: bool,
) -> None:
    """Serve the page until interrupted; the address is tried before the model is loaded."""
    from ..asking import load
    from ..strategies.budgets import Budget as Allowance
    from .page_server import Service, listen, private_folder, serve
    from .page_visitors import Desks
    from .stream_page import CSS, MAX_UPLOAD, build_page
    from .stream_visitors import Desk

    if not Allowance(budget).is_share:
        raise ValueError(
            f"The page takes a share such as --budget 0.5, found {budget}: a number of tokens needs"
            " --terminal."
        )
    sessions = 1 if source == "-" else sessions  # data that was read from a pipe is gone
    names = [strategy, *(s for s in STRATEGIES if s != strategy)]
    with listen(host, port) as listening, private_folder() as folder:
        loaded = None if model_id is None else load(model_id)
        bounds = bounds | {"max_bytes": PAGE_BYTES // sessions}

        def make(strategy: str, budget: float) -> StreamSession:
            """One session: of its own tiny model for every browser, or of one shared large model."""
            model, processor = loaded or load(None, TINY)
            return make_session(model, processor, strategy, budget, **bounds)

        make(strategy, budget).close()
        desks = Desks(lambda: Desk(make, fps, speed), sessions)
        examples = EXAMPLES if model_id is None else ()
        try:
            page = build_page(desks, names, source, budget, fps, allow_sources, examples)
            room = MAX_UPLOAD if allow_sources else 0
            service = Service(page, listening, host, hosts, folder if allow_sources else None, room, CSS)
            serve(service, "watch the stream and ask", SOURCES if allow_sources else "", show)
        finally:
            desks.close()


def make_session(
    model: Any,
    processor: Any,
    strategy: str,
    budget: float | int,
    max_tokens: int | None = None,
    max_steps: int | None = None,
    max_bytes: int | None = None,
) -> StreamSession:
    """A session with a strategy or none; `max_steps` limits its memory to the latest steps."""
    from ..streaming.session import StreamSession

    bounds: dict[str, Any] = {"max_tokens": max_tokens, "max_bytes": max_bytes}
    if max_steps is not None:
        bounds["memory_options"] = {"sinks": 0, "recent": max_steps, "max_steps": max_steps}
    if strategy == "none":
        return StreamSession(model, processor, **bounds)
    return StreamSession(model, processor, strategy, budget, **bounds)
