"""An endless labelled video, drawn while it is read: digits and shapes on photographs."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from .errors import VideoError, checked
from .frame import Frame

if TYPE_CHECKING:
    from ..tiny.clips import Stream

# frames after which a fresh stream begins, so that a frame costs the same however late it comes
_CHAPTER = 4096


class SyntheticReader:
    """A `VideoReader` over the labelled streams of `vtoken.tiny.clips`: 96 x 96 px, reproducible.

    Args:
        seed: which stream, 0 or more.
        fps: frames per second.
        frames: where it ends, None for never.

    Raises:
        VideoError: an argument out of range.
    """

    backend, why = "synthetic", "a synthetic stream is drawn, not decoded"

    @checked
    def __init__(self, seed: int = 0, fps: float = 2.0, frames: int | None = None):
        if seed < 0 or not fps > 0 or (frames is not None and frames < 1):
            raise VideoError(
                f"a synthetic video needs seed >= 0, fps > 0, frames >= 1; got {seed}, {fps}, {frames}"
            )
        self.seed, self.fps, self.frames = seed, float(fps), frames
        self.duration = None if frames is None else frames / self.fps
        self._chapter = lru_cache(maxsize=2)(self._open)

    def labels(self, index: int) -> tuple[Stream, int]:
        """The stream that draws a frame, and the frame's number in it, as `questions_at` counts.

        Frames 0 to 4095 are those of ``stream(seed)``, the next 4096 those of another stream, and so on.
        """
        return self._chapter(index // _CHAPTER), index % _CHAPTER

    def __len__(self) -> int:
        if self.frames is None:
            raise TypeError("a synthetic stream has no end and so no length")
        return self.frames

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        while self.frames is None or index < self.frames:
            yield self._draw(index)
            index += 1

    def get_frames(
        self, indices: Sequence[int] | None = None, *, seconds: Sequence[float] | None = None
    ) -> list[Frame]:
        """See `VideoReader`."""
        if (indices is None) == (seconds is None):
            raise VideoError("get_frames takes either indices or seconds")
        if indices is None:
            indices = [int(np.floor(t * self.fps + 1e-6)) for t in seconds or ()]
        for index in indices:
            if index < 0 or (self.frames is not None and index >= self.frames):
                last = "without end" if self.frames is None else str(self.frames - 1)
                raise VideoError(f"frame {index} does not exist; the synthetic video has frames 0 to {last}")
        return [self._draw(operator.index(i)) for i in indices]

    def close(self) -> None:
        self._chapter.cache_clear()

    def __enter__(self) -> SyntheticReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, chapter: int) -> Stream:
        from ..tiny.clips import stream

        return stream(self.seed + 1_000_003 * chapter, fps=self.fps)

    def _draw(self, index: int) -> Frame:
        labelled, place = self.labels(index)
        return Frame(np.asarray(labelled.frame(place).image.convert("RGB")), index / self.fps, index)


def from_address(address: str) -> SyntheticReader:
    """The reader of an address such as "synthetic://SEED?fps=2&frames=100".

    Raises:
        VideoError: anything else stands there.
    """
    parts = urlsplit(address)
    given = dict(parse_qsl(parts.query))
    try:
        seed, fps = int(parts.netloc or 0), float(given.pop("fps", 2.0))
        frames = int(given.pop("frames")) if "frames" in given else None
        if given:
            raise ValueError
    except ValueError:
        raise VideoError(f"{address!r} is not of the form synthetic://SEED?fps=2&frames=100") from None
    return SyntheticReader(seed, fps, frames)
