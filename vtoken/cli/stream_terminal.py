"""Questions to a stream at a terminal: typed while it plays, or given beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from ..streaming.session import StreamSession
from .stream_player import Player

if TYPE_CHECKING:
    from rich.console import Console

    from ..streaming.answers import Answer
    from ..video import Frame

SOON = 3.0  # seconds to wait for a first frame before asking for questions
HELP = "Type a question and press Enter; an empty line shows how the stream is doing, q ends."


def converse(out: Console, player: Player) -> None:
    """Answer typed questions until `q` or the end of the input.

    Raises:
        ValueError: if the source breaks off before its first frame.
    """
    import click

    if not player.wait_until(0.0, SOON) and player.ended and player.error and not player.readings:
        raise ValueError(player.error)
    out.print(HELP, style="dim")
    while True:
        try:
            said = click.prompt("", prompt_suffix="> ", default="", show_default=False).strip()
        except (click.Abort, EOFError):
            return
        if said == "q":
            return
        if not said:
            show_status(out, player)
        elif not player.readings:
            out.print("There is no frame to ask about yet.", style="dim")
        else:
            ask(out, player.session, None, said)


def recite(
    out: Console, session: StreamSession, frames: Iterable[Frame], questions: Sequence[tuple[float, str]]
) -> list[Answer]:
    """Ask prepared questions `(seconds, text)`, each at its time and before a later frame comes.

    Raises:
        ValueError: if the stream ends before the last question.
    """
    waiting = sorted(questions, key=lambda q: q[0])
    answers, last = [], -math.inf
    for frame in frames:
        while waiting and waiting[0][0] < frame.seconds and last > -math.inf:
            answers.append(ask(out, session, *waiting.pop(0)))
        if not waiting:
            return answers
        session.push(frame)
        last = frame.seconds
    while waiting and waiting[0][0] <= last:
        answers.append(ask(out, session, *waiting.pop(0)))
    if waiting:
        raise ValueError(
            f"The stream ended at {max(last, 0):g} s, before the question at {waiting[0][0]:g} s."
        )
    return answers


def ask(out: Console, session: StreamSession, t: float | None, question: str) -> Answer:
    """One question about the stream up to time t (None: up to now), its answer printed as it comes."""
    if t is not None:
        out.print(f"[dim]{t:g} s[/dim] {escape(question)}")
    pieces = session.stream_answer(question, t)
    for piece in pieces:
        out.print(piece, end="", style="bold", markup=False, highlight=False)
    answer = pieces.answer
    assert answer is not None
    facts = f"{len(answer.frames_used)} frames, {answer.visual_tokens} visual tokens, {answer.seconds:.2f} s"
    out.print(f"  [dim]({facts})[/dim]")
    return answer


def show_status(out: Console, player: Player) -> None:
    """One line about the stream."""
    stats, last = player.session.stats, player.readings[-1] if player.readings else None
    if last is None:
        out.print("No frame yet." + (f" {player.error}" if player.error else ""))
        return
    out.print(
        f"{last.seconds:.1f} s, {stats['frames']} frames: {last.tokens} of {last.rows} visual tokens per"
        f" step, {last.saved:.0%} of the tower's FLOPs saved, {stats['tokens']} tokens and"
        f" {stats['bytes'] / 2**20:.2f} MiB in memory, {last.latency * 1000:.0f} ms per step"
        + (f"; {player.error}" if player.error else "")
    )
