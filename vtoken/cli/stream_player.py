"""Plays a stream into a session, with its latest readings and pictures."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from ..drawing import draw_cells
from ..streaming.memory import Step
from ..streaming.session import StreamSession
from ..streams import TowerUse

if TYPE_CHECKING:
    from ..tiny.clips import Stream

COMPUTED = (255, 70, 70)
SIDE = 480  # px of the longer side of a drawn frame


@dataclass(frozen=True)
class Reading:
    """Cost of one step of the stream (one frame, or the frames that the tower joins).

    Attributes:
        seconds: time of its last frame in the stream.
        tokens: visual tokens that were kept.
        rows: visual tokens that the unpruned model would read.
        saved: share of the tower's FLOPs that were not spent, 0 where nothing is reused.
        nbytes: bytes of the session's memory after this step.
        held: visual tokens in it.
        latency: seconds that the session took for it.
    """

    seconds: float
    tokens: int
    rows: int
    saved: float
    nbytes: int
    held: int
    latency: float


class Player:
    """Reads a source in a thread, pushes its frames into a session and keeps the latest readings.

    Args:
        session: takes the frames; stays open when the player is closed.
        source: as for `vtoken.video.LiveReader`.
        fps: frames per second to take.
        speed: how many times faster than life a recording plays.
        history: readings that are kept.
        frames: frames that are kept as they came, for `frames_at`.

    Raises:
        VideoError: if the source does not exist.
    """

    def __init__(
        self,
        session: StreamSession,
        source: Any,
        fps: float = 2.0,
        speed: float = 1.0,
        history: int = 240,
        frames: int = 0,
    ) -> None:
        from ..video import LiveReader

        self.session, self.source, self.fps = session, source, fps
        self._frames: deque[Any] = deque(maxlen=frames)
        self.readings: deque[Reading] = deque(maxlen=history)
        self.error: str | None = None
        self._latest: tuple[np.ndarray, Step, TowerUse | None] | None = None
        self._running, self._closed = threading.Event(), False
        self._running.set()
        self.live = LiveReader(source, fps=fps, speed=speed, drop=passes_by(source))
        self._thread = threading.Thread(target=self._play, name="vtoken-player", daemon=True)
        self._thread.start()

    def _play(self) -> None:
        try:
            for frame in self.live:
                self._running.wait()
                if self._closed:
                    return
                began = time.perf_counter()
                step = self.session.push(frame)
                self._frames.append(frame)
                if step is not None:
                    self._note(frame.image, step, time.perf_counter() - began)
        except Exception as error:  # for the user of the thread
            self.error = str(error)

    def _note(self, image: np.ndarray, step: Step, latency: float) -> None:
        use = self.session.state.last
        saved = 1 - use.flops / use.flops_dense if use is not None and use.flops_dense else 0.0
        self._latest = image, step, use
        stats = self.session.stats
        self.readings.append(
            Reading(
                step.seconds[-1], len(step.kept), step.rows, saved, stats["bytes"], stats["tokens"], latency
            )
        )

    @property
    def playing(self) -> bool:
        """Whether frames are being taken."""
        return self._running.is_set() and self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """Whether the source has no more frames, or broke off (then `error` says why)."""
        return not self._thread.is_alive()

    def pause(self) -> None:
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    def wait_until(self, seconds: float, timeout: float = 60.0) -> bool:
        """Wait up to `timeout` seconds for a frame at or after this time; whether one was taken."""
        end = time.monotonic() + timeout
        while not self.readings or self.readings[-1].seconds < seconds:
            if self.ended or time.monotonic() > end:
                return bool(self.readings) and self.readings[-1].seconds >= seconds
            time.sleep(0.01)
        return True

    def picture(self) -> Image.Image | None:
        """The latest frame with its kept and computed cells drawn on it; None before the first frame."""
        return None if self._latest is None else draw_step(*self._latest)

    def frames_at(self, seconds: Sequence[float]) -> list[Any] | None:
        """The frames at these times of the stream; None if one of them is no longer kept."""
        kept = {float(frame.seconds): frame for frame in list(self._frames)}
        return [kept[t] for t in seconds] if all(t in kept for t in seconds) else None

    def labels(self, since: float, now: float) -> tuple[Stream, float, float] | None:
        """The labelled stream of an interval, with its own times for both ends; None if there is none."""
        if not str(self.source).startswith("synthetic://"):
            return None
        from ..video.synthetic import from_address

        reader = from_address(str(self.source))
        (first, a), (last, b) = (reader.labels(int(t * reader.fps + 1e-6)) for t in (since, now))
        return (last, a / last.fps, b / last.fps) if first is last else None

    def close(self) -> None:
        """Stop reading and wait for the thread."""
        self._closed = True
        self.live.close()
        self._running.set()
        self._thread.join()

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def passes_by(source: Any) -> bool:
    """Whether a source cannot wait, so that frames must be dropped: cameras, pipes and the network."""
    from ..video.source import resolve

    if isinstance(source, Iterable) and not isinstance(source, str | bytes | Path):
        return False
    if str(source).startswith("synthetic://"):
        return False
    found = resolve(source)
    return found.live or found.kind == "network"


def draw_step(image: np.ndarray, step: Step, use: TowerUse | None = None, side: int = SIDE) -> Image.Image:
    """Draw one step: kept cells outlined, other cells dimmed, red dots at cells computed anew by the tower.

    Args:
        image: (h, w, 3) uint8.
        step: its kept tokens; a step without a grid (several crops) is shown plain.
        use: the parts that the tower computed for it, if others were reused.
        side: px of the longer side of the result, rounded to whole cells.
    """
    picture = Image.fromarray(image)
    if step.grid is None:
        return picture
    cells = step.cells[step.cells >= 0] % (step.grid[0] * step.grid[1])
    drawn = draw_cells(picture, step.grid, cells, cell=max(4, side // max(step.grid)), dim=0.6)
    if use is not None and use.shares and use.references < len(use.tokens):
        share = use.shares[-1].numpy()
        pen, (rows, columns) = ImageDraw.Draw(drawn), share.shape
        high, wide = drawn.height / rows, drawn.width / columns
        for r, c in np.argwhere(share >= 0.5):
            x, y, radius = (c + 0.5) * wide, (r + 0.5) * high, min(high, wide) / 6
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COMPUTED)
    return drawn
