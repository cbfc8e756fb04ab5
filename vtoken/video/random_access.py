"""Decodes chosen frames of a file, each from the key frame before it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

from .frame_times import FrameTable
from .libav import decoded
from .stream_track import Track

# key frames that the decoder goes back where it cannot decode a frame from the nearest
_FURTHER = (1, 2, 4, 8)


class RandomAccess:
    """Random access to the frames of one track by their place in presentation order."""

    def __init__(self, track: Track, table: FrameTable):
        self._track, self._table = track, table

    def pick(self, ordinals: list[int]) -> Iterator[tuple[int, tuple[int, Any] | None]]:
        """(wanted, (ordinal, frame)) for ascending ordinals.

        Where the wanted frame is damaged, a neighbour that can be decoded; None if there is none.
        """
        run: Iterator[tuple[int, Any]] = iter(())
        ahead: tuple[int, Any] | None = None  # the decoder's last frame
        for wanted in ordinals:
            if ahead is None or (ahead[0] < wanted and self._key_between(ahead[0], wanted)):
                run = self.frames_from(wanted, only=ordinals)
                ahead = next(run, None)
            while ahead is not None and ahead[0] < wanted:
                ahead = next(run, None)
            if ahead is not None and ahead[0] == wanted:
                yield wanted, ahead
                continue
            ahead = None  # the track will be moved
            yield wanted, self._nearest(wanted)

    def frames_from(
        self, ordinal: int, back: int = 0, only: Collection[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """(ordinal, frame) ascending, from `ordinal` on, or from `back` key frames before its own.

        Args:
            only: the frames that are of use; of the others, those that no frame refers to are not decoded.
        """
        table = self._table
        if ordinal >= len(table):
            return
        if table.pts is None:
            yield from self._count_from(0 if back else ordinal)
            return
        key = table.key_before(ordinal, back)
        # frames before the key frame refer to frames that were not decoded
        least = (table.ordinal(key) or 0) if back else ordinal
        track = self._track
        sparing = None if only is None else Sparing({int(table.pts[i]) for i in only})
        for frame in decoded(track.packets_from(key), track.damage, track.limits, sparing):
            place = None if frame.pts is None else table.ordinal(frame.pts)
            if place is not None and place >= least:
                least = place + 1
                yield place, frame

    def _nearest(self, wanted: int) -> tuple[int, Any] | None:
        """The last frame up to `wanted` that can be decoded, else the first after it."""
        best = self._again(wanted)
        for found in self.frames_from(wanted) if best is None else ():
            return found
        return best

    def _again(self, wanted: int) -> tuple[int, Any] | None:
        """The last frame up to `wanted` that can be decoded, starting from earlier key frames.

        A picture that is refreshed bit by bit takes more than one of them.
        """
        best: tuple[int, Any] | None = None
        for back in _FURTHER:
            for ordinal, frame in self.frames_from(wanted, back):
                if ordinal > wanted:
                    break
                if best is None or ordinal > best[0]:
                    best = ordinal, frame
            if best is not None and best[0] == wanted:
                break
        return best

    def _key_between(self, at: int, wanted: int) -> bool:
        table = self._table
        return table.pts is not None and table.key_before(wanted) > table.pts[at]

    def _count_from(self, ordinal: int) -> Iterator[tuple[int, Any]]:
        track = self._track
        track.rewind()
        # decoding damage in another way may bring more frames than were counted
        yield from islice(
            enumerate(decoded(track.packets(), track.damage, track.limits)), ordinal, len(self._table)
        )


class Sparing:
    """Decodes packets, but not the pictures that are neither wanted nor referred to.

    The frames that come out are those of a full decode, bit for bit: no other picture is predicted from one
    that is not referred to.

    Args:
        wanted: pts of the frames that must come out.
    """

    def __init__(self, wanted: Collection[int]):
        self._wanted, self._due = wanted, 0

    def __call__(self, packet: Any) -> list[Any]:
        # the packet after a wanted one may hold the second field of the same picture
        self._due = 2 if packet.pts in self._wanted else self._due - 1
        context = packet.stream.codec_context
        context.skip_frame = "DEFAULT" if self._due > 0 else "NONREF"
        try:
            return packet.decode()  # type: ignore[no-any-return]
        finally:
            context.skip_frame = "DEFAULT"
