"""Base of compressors that make one token of every rectangle of a picture's grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..selection import Selection
from ..tokens import Needs, Segment, TowerInfo, VisualTokens
from .common.grids import pooled_grid
from .common.pooling import RepeatOrder, pooled
from .trained import TrainedStrategy

MOST_PLACES = 1024  # along a side, so that a config from elsewhere cannot ask for weights without end
SHARE = 0.25  # of the visual tokens, where neither a budget nor a number of tokens is given


def added_mlp(inner: int, width: int) -> nn.Sequential:
    """An MLP whose answer is 0 at the start."""
    last = nn.Linear(width, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inner, width), nn.GELU(), last)


@dataclass
class GridCompressor(TrainedStrategy):
    """One token per rectangle: the mean of its features, and what the weights add to it.

    Override:
        connect: what is added.
        layers_read: the tower layers that it reads. Default: the one that feeds the projector.
        repeats: frames of the static video that an image is read as. Default: one.

    Args:
        budget: share of the visual tokens, or tokens per image or frame; the frames of an image share it.
        tokens_per_frame: in place of a budget, tokens of every frame, also of each of an image's.
    """

    free: ClassVar[tuple[str, ...]] = ("budget", "positions", "tokens_per_frame")

    budget: float | int | None = None  # type: ignore[assignment]
    _: KW_ONLY
    tokens_per_frame: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.tokens_per_frame is not None:
            raise ValueError(
                f"Give {self.info.name} a budget or tokens_per_frame, found {self.budget} and"
                f" {self.tokens_per_frame}."
            )
        self.check_sizes("tokens_per_frame")

    def check_sizes(self, *names: str, most: int | None = None) -> None:
        """Raise ValueError for an option below 1, or above `most`, that is not None."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}.")
            if value is not None and most is not None and value > most:
                raise ValueError(f"{name} must be at most {most}, found {value}.")

    # -- to override -----------------------------------------------------------------------------------------
    def connect(
        self, maps: Sequence[Tensor], steps: Tensor, grid: tuple[int, int], tokens: VisualTokens
    ) -> Tensor:
        """(t, rows * columns, d), added to the means of the rectangles of a grid.

        Args:
            maps: per layer read (t, h, w, C), the tower's output where the rectangles are.
            steps: (t,) time steps of the frames.
            grid: (rows, columns) of rectangles.
            tokens: the image or video.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what its weights add.")

    def layers_read(self, tower: TowerInfo) -> tuple[int, ...]:
        return (tower.feature_layer,)

    @property
    def repeats(self) -> int:
        return 1

    @property
    def order(self) -> RepeatOrder:
        """Order of the tokens of an image's frames."""
        return "place"

    # -- provided --------------------------------------------------------------------------------------------
    def needs(self, tower: TowerInfo | None) -> Needs:
        return Needs(states=(0,) if tower is None else self.layers_read(tower), grid=True)

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens per segment, those of all frames of an image together."""
        return [
            steps * math.prod(pooled_grid(s.grid, most)) if most else 0
            for s, (steps, most) in zip(segments, self._shares(segments, budget), strict=True)
        ]

    def _shares(
        self, segments: Sequence[Segment], budget: float | int | None = None, most: int | None = None
    ) -> list[tuple[int, int]]:
        """Per segment the frames whose tokens enter the LLM, and at most so many tokens of each.

        Args:
            most: frames that the tower made of an image: one where it is a frame of a stream.
        """
        most = self.repeats if most is None else min(self.repeats, most)
        budget, out = self.budget if budget is None else budget, []
        fixed = self.tokens_per_frame if budget is None else None
        allowed = self.allowance(SHARE if budget is None else budget).tokens(segments)
        for segment, n in zip(segments, allowed, strict=True):
            repeats = 1 if segment.kind == "frame" else most
            each = n // max(1, min(repeats, n)) if fixed is None else min(fixed, segment.fed)
            rows, columns = pooled_grid(segment.grid, each) if each else (1, 1)
            # every frame of an image has a place of its own in each rectangle
            room = (segment.grid[0] // rows) * (segment.grid[1] // columns)
            frames = min(repeats, room) if fixed is not None else min(repeats, room, n)
            out.append((frames if each else 1, each))
        return out

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int | None:
        padded = any(s.fed < s.size for s in segments)
        return None if padded else super()._total_kept(segments, separators)

    def time_steps(self, step: int, of: int, frames: int) -> Tensor:
        """(frames,) time steps from `step` on, in a picture of `of` frames."""
        return torch.arange(frames) + step

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.tower is not None
        states = [tokens.states(layer) for layer in self.layers_read(tokens.tower)]
        have = states[-1].shape[1]
        shares = self._shares(tokens.segments, most=have)
        parts = pooled(tokens, [most for _, most in shares])
        sizes = [rows * columns for rows, columns in parts.grids]
        base, counts = parts.means(tokens.features).split(sizes), parts.sizes.split(sizes)
        start = tokens.memory.get("frames", 0)  # above 0 in a stream only
        tokens.memory["frames"] = start + len(tokens.segments)
        groups: dict[tuple[int, ...], list[tuple[int, list[Tensor], Tensor]]] = {}
        for i, (segment, (frames, _)) in enumerate(zip(tokens.segments, shares, strict=True)):
            filled = counts[i][counts[i] > 0]  # a crop can be partly padding
            frames = min(frames, have, int(filled.min()) if len(filled) else 1)
            film = segment.kind == "frame"
            first = start + (i if film else have - frames)
            steps = self.time_steps(first, len(tokens.segments) if film else have, frames)
            maps = [parts.map_of(i, s[i, -frames:]) for s in states]
            groups.setdefault((*parts.grids[i], *maps[-1].shape[1:3]), []).append((i, maps, steps))
        out = [x[None] for x in base]
        for (rows, columns, *_), members in groups.items():
            if rows:
                each, maps_of, steps_of = zip(*members, strict=True)
                joined = [torch.cat(some) for some in zip(*maps_of, strict=True)]
                added = self.connect(joined, torch.cat(steps_of), (rows, columns), tokens)
                for i, some in zip(each, added.split([len(s) for s in steps_of]), strict=True):
                    out[i] = base[i] + some.to(base[i])
        return parts.selection(out, self.order)
