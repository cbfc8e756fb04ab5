"""The state of the stream page for each browser: one stream with its questions and answers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..patching import disabled
from ..streaming.session import StreamSession
from .page_visitors import MAX_QUESTION
from .stream_player import Player

PLOTS = {  # column -> title
    "tokens": "visual tokens kept per step",
    "saved": "tower FLOPs saved (%)",
    "memory": "visual tokens in memory",
    "latency": "latency per step (ms)",
}
WINDOW = 120  # readings in a plot
TALK = 20  # questions that are kept with their answers
BUSY = "One at a time: wait until that is done."
NOTHING = "There is no frame to ask about yet: press Play first."


@dataclass(frozen=True)
class Said:
    """One question with its answer and the facts known about it; plain text, not escaped.

    Attributes:
        truth: the right answer by the remembered frames, of a labelled stream only.
        unpruned: the model's answer from all visual tokens of the same frames, if the session is a short
            window.
        facts: cost of the answer.
    """

    question: str
    answer: str = ""
    truth: str | None = None
    unpruned: str | None = None
    facts: str = ""


class Desk:
    """One browser's stream: its player, its session, and the questions asked about it.

    Args:
        make_session: `make_session(strategy, budget) -> StreamSession`.
        fps: frames per second to take from a source.
        speed: how many times faster than life a recording plays.
    """

    def __init__(
        self, make_session: Callable[[str, float], StreamSession], fps: float = 2.0, speed: float = 1.0
    ) -> None:
        self.make_session, self.fps, self.speed = make_session, fps, speed
        self.session: StreamSession | None = None
        self.player: Player | None = None
        self.wanted: tuple[str, str, float, float] | None = None
        self.talk: deque[Said] = deque(maxlen=TALK)
        self.upload: Path | None = None
        self.touched = time.monotonic()
        self._lock = threading.RLock()
        self._turns = {"play": threading.Lock(), "answer": threading.Lock()}

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Within the block "play" or "answer" runs. Raises ValueError if that name runs already."""
        lock = self._turns[what]
        if not lock.acquire(blocking=False):
            raise ValueError(BUSY)
        try:
            yield
        finally:
            lock.release()

    def play(self, source: str, strategy: str, budget: float, fps: float | None = None) -> None:
        """Begin a stream, or resume the paused one if nothing has changed.

        Raises:
            ValueError: for a source that cannot be opened or a strategy that does not fit.
        """
        wanted = (source.strip(), strategy, budget, fps or self.fps)
        with self._lock:
            if self.player is not None and self.wanted == wanted and not self.player.ended:
                self.player.resume()
                return
            self._end()
            self.session = self.make_session(strategy, budget)
            try:
                name = int(wanted[0]) if wanted[0].isdecimal() else wanted[0]
                self.player = Player(
                    self.session, name, fps=wanted[3], speed=self.speed, frames=self._frames_kept()
                )
            except BaseException:
                self._end()
                raise
            self.wanted = wanted

    def pause(self) -> None:
        player = self.player
        if player is not None:
            player.pause()

    def close(self) -> None:
        """End the stream, and delete its questions and its uploaded files."""
        with self._lock:
            self._end()
            self.talk.clear()
            if self.upload is not None:
                self.upload.unlink(missing_ok=True)
                self.upload = None

    def _end(self) -> None:
        if self.player is not None:
            self.player.close()
        if self.session is not None:
            self.session.close()
        self.player = self.session = None

    def _frames_kept(self) -> int:
        """Frames needed for a comparison with the unpruned model: those of a short window, else 0."""
        assert self.session is not None
        steps = getattr(self.session.memory, "max_steps", None)
        return 0 if steps is None else (steps + 1) * self.session.frames.unit

    # -- questions
    def answer(self, question: str) -> Iterator[Said]:
        """The growing answer, yielded again and again; at the end with its cost."""
        session, player = self.session, self.player
        question = question.strip()[:MAX_QUESTION]
        if session is None or player is None or not player.readings:
            yield Said(question, NOTHING)
            return
        said = Said(question)
        self.talk.append(said)
        try:
            pieces = session.stream_answer(question)
            for piece in pieces:
                said = self._replace(said, replace(said, answer=said.answer + piece))
                yield said
            answer = pieces.answer
            assert answer is not None
            facts = (
                f"at {answer.time:.1f} s, from {len(answer.frames_used)} frames and {answer.visual_tokens}"
                f" visual tokens, first word after {answer.first_token_seconds * 1000:.0f} ms"
            )
            truth = self._truth(player, question, answer.frames_used)
            said = self._replace(said, replace(said, answer=answer.text, facts=facts, truth=truth))
            yield said
            unpruned = self._unpruned(session, player, question, answer.frames_used)
            if unpruned is not None:
                yield self._replace(said, replace(said, unpruned=unpruned))
        except (ValueError, TypeError, RuntimeError) as error:
            yield self._replace(said, replace(said, answer=str(error).splitlines()[0]))

    def _replace(self, old: Said, new: Said) -> Said:
        """Put `new` in the place of `old`, unless `old` has been forgotten."""
        for i, said in enumerate(self.talk):
            if said is old:
                self.talk[i] = new
        return new

    def _truth(self, player: Player, question: str, seconds: tuple[float, ...]) -> str | None:
        """The right answer of a labelled stream; None where a labelled moment may lie between two frames."""
        labels = player.labels(seconds[0], seconds[-1])
        if labels is None:
            return None
        stream, since, now = labels
        if player.fps < stream.fps / stream.hold:
            return None
        return stream.answer_to(question.lower(), now, since)

    def _unpruned(
        self, session: StreamSession, player: Player, question: str, seconds: tuple[float, ...]
    ) -> str | None:
        """The model's answer from all visual tokens of the frames at these times."""
        frames = player.frames_at(seconds)
        if frames is None or session._patch is None:
            return None
        with (
            disabled(session.model),
            StreamSession(session.model, session.processor, fps=session.prompts.fps) as plain,
        ):
            for frame in frames:
                plain.push(frame)
            return plain.ask(question).text

    # -- status and figures
    def status(self) -> str:
        """One line about the stream."""
        session, player = self.session, self.player
        if player is None or session is None:
            return "Nothing is playing."
        stats = session.stats
        state = "playing" if player.playing else "ended" if player.ended else "paused"
        words = [
            state,
            f"{stats['last'] or 0:.1f} s",
            f"{stats['frames']} frames",
            f"{stats['tokens']} of at most {self.bound(stats)} visual tokens in memory",
            f"{stats['forgotten']} steps forgotten",
        ]
        if player.live.stats.dropped:
            words.append(f"{player.live.stats.dropped} frames dropped")
        return " · ".join(words) + (f" · {player.error}" if player.error else "")

    def bound(self, stats: dict[str, Any]) -> int | None:
        """Largest number of visual tokens in the memory."""
        steps, player = stats.get("max_steps"), self.player
        if steps is None or player is None or not player.readings:
            return stats["max_tokens"]
        return min(stats["max_tokens"], steps * player.readings[-1].rows)

    def table(self) -> Any:
        """The latest readings as a data frame: `seconds` and the columns of `PLOTS`."""
        import pandas as pd

        player = self.player
        readings = list(player.readings)[-WINDOW:] if player is not None else []
        rows = [(r.seconds, r.tokens, 100 * r.saved, r.held, 1000 * r.latency) for r in readings]
        return pd.DataFrame(rows, columns=["seconds", *PLOTS], dtype=float)
