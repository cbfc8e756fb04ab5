"""`vtoken demo stream`: questions to a stream, in a browser or at a terminal."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ..shell import Budget, Command, console, fail, require

if TYPE_CHECKING:
    from .session import StreamSession

SYNTHETIC = "synthetic://0"
TINY = "qwen2_5_vl"
STRATEGIES = ("stc", "stc_cacher", "stc_pruner", "none")


@click.command("stream", cls=Command)
@click.option("--source", default=SYNTHETIC, show_default=True, help="File, rtsp/http address, camera number.")
@click.option("--model", "model_id", help="Hub id or folder of a model that reads videos; default: a shipped tiny one.")
@click.option("--strategy", default=STRATEGIES[0], show_default=True, help="A strategy that fits streams, or none.")
@click.option("--budget", type=Budget(), default="0.5", show_default=True, help="Share of the visual tokens to keep.")
@click.option("--fps", type=click.FloatRange(min=0, min_open=True), default=2.0, show_default=True)
@click.option("--speed", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="Of recordings.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Visual tokens that the session remembers at most.")
@click.option("--terminal", is_flag=True, help="No page: type questions here.")
@click.option("--ask", "questions", type=(float, str), multiple=True, help="SECONDS QUESTION; may be repeated.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address that the page is served on.")
@click.option("--port", type=int, help="Its port; default: a free one from 7860.")
@click.option("--open/--no-open", "show", default=True, show_default=True, help="Open the page in a browser.")
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
    host: str,
    port: int | None,
    show: bool,
) -> None:
    if not questions and not terminal:
        require("gradio", extra="stream")
    if not source.startswith("synthetic:"):
        require("av", extra="stream")
    from ..demo import load

    model, processor = load(model_id, TINY)
    make = partial(make_session, model, processor, max_tokens=max_tokens)
    name: str | int = int(source) if source.isdigit() else source
    if questions:
        from ..video import LiveReader
        from .terminal import recite

        with make(strategy, budget) as session, LiveReader(name, fps=fps, speed=None, drop=False) as frames:
            recite(console(), session, frames, questions)
    elif terminal:
        from .player import Player
        from .terminal import converse

        with make(strategy, budget) as session, Player(session, name, fps, speed) as player:
            converse(console(), player)
    else:
        from .page import Desk, build_page

        desk = Desk(make, fps, speed)
        names = [strategy, *(s for s in STRATEGIES if s != strategy)]
        try:
            build_page(desk, names, source, budget).launch(server_name=host, server_port=port, inbrowser=show)
        finally:
            desk.close()


def make_session(
    model: Any, processor: Any, strategy: str, budget: float | int, max_tokens: int | None = None
) -> StreamSession:
    """A session with a strategy, or with none."""
    from .session import StreamSession

    if strategy == "none":
        return StreamSession(model, processor, max_tokens=max_tokens)
    return StreamSession(model, processor, strategy, budget, max_tokens=max_tokens)
