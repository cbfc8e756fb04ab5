"""The frames of one call of the vision tower, for strategies that reuse them or attend across them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..adapters.base import Adapter
from ..adapters.towers.capture import FramePass
from ..adapters.towers.pixel_pass import PixelPass
from ..streams import PixelReuse, Reuse, StreamState
from ..temporal import Temporal, TemporalPass


class FramePasses:
    """Every video of a call is a stream of its own, or all of a call continues the given stream.

    Args:
        adapter: the model's parts and geometry.
        reuse: per modality, the reuse inside the tower.
        temporal: per modality, () -> the strategy's attention across frames.
    """

    def __init__(
        self,
        adapter: Adapter,
        reuse: dict[str, Reuse | PixelReuse],
        temporal: dict[str, Callable[[], Temporal]],
    ) -> None:
        self.adapter, self.reuse, self.temporal = adapter, reuse, temporal

    def of_reuse(self, modality: str, given: dict[str, Any], stream: StreamState | None) -> FramePass | None:
        """The frames of a call that reuses, None if it does not."""
        reuse = self.reuse.get(modality)
        if isinstance(reuse, PixelReuse) and reuse.interval == 1:
            return PixelPass([], stream)
        if reuse is None or (stream is None and modality != "video"):
            return None
        frames = self._frames(modality, given, stream)
        if not frames:
            return None
        kind = PixelPass if isinstance(reuse, PixelReuse) else FramePass
        return kind(frames if stream is None else [sum(frames)], stream)

    def of_attention(
        self, modality: str, given: dict[str, Any], stream: StreamState | None
    ) -> TemporalPass | None:
        """The frames of a call with attention across them: a video, or what continues a stream."""
        if modality not in self.temporal:
            return None
        first = min(self.temporal[modality]().layers)
        if stream is None and modality == "image":
            return TemporalPass(None, None, first)
        frames = self._frames(modality, given, stream)
        if stream is not None and not frames:
            raise ValueError(
                "Images that the model cuts into crops are no frames of a stream for a strategy with"
                " attention across frames: give them outside of vtoken.stream, or use another strategy."
            )
        return TemporalPass(frames if stream is None else [sum(frames)], stream, first)

    def _frames(self, modality: str, given: dict[str, Any], stream: StreamState | None) -> list[int]:
        """Frames per video of a call."""
        frames = self.adapter.frames(modality, given)
        if stream is not None and modality == "video" and len(frames) > 1:
            raise ValueError(
                f"A stream goes on with one video per call, found {len(frames)}: give each video a"
                " vtoken.stream of its own."
            )
        return frames
