"""Visual tokens divided into the nearly equal rectangles of a smaller grid per segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...kernels import gather_merge
from ...selection import Selection
from ...tokens import VisualTokens
from .grids import blocks_of, pooled_grid, window_of

RepeatOrder = Literal["place", "tile", "repeat"]


@dataclass
class Pooled:
    """Rectangles of the grids of all segments, numbered segment by segment in raster order.

    Attributes:
        grids: (rows, columns) of rectangles per segment; (0, 0) for a segment that gets none.
        group: (n,) int64, the rectangle of every token; -1 for separators and tokens of no rectangle.
        order: (p,) int64, the tokens that have one, sorted by rectangle and inside it by distance from its
            centre; the lower index wins among equals.
        windows: per segment the rows, and the columns, that are divided: the first and one past the last, as
            shares of the grid.
    """

    grids: list[tuple[int, int]]
    group: Tensor
    order: Tensor
    windows: list[tuple[tuple[float, float], ...]]

    @property
    def sizes(self) -> Tensor:
        """(rectangles,) int64, tokens of every rectangle."""
        return torch.bincount(self.group[self.order], minlength=sum(r * c for r, c in self.grids))

    def rank(self) -> Tensor:
        """(p,) int64, the place of each token of `order` inside its rectangle, 0 for the most central."""
        sizes = self.sizes
        first = (sizes.cumsum(0) - sizes)[self.group[self.order]]
        return torch.arange(len(self.order), device=first.device) - first

    def centres(self) -> Tensor:
        """(rectangles,) int64, the most central token of every rectangle; -1 where there is none."""
        table = self.table()
        return table[:, 0] if table.shape[1] else torch.full_like(self.sizes, -1)

    def means(self, features: Tensor) -> Tensor:
        """(rectangles, d), the mean of the features (n, d) of each rectangle; of an empty one anything."""
        weight = torch.where(self.group >= 0, 1 / self.sizes[self.group.clamp(min=0)], 0.0)
        return gather_merge(features, self.centres().clamp(min=0), self.group, weight)

    def map_of(self, segment: int, states: Tensor) -> Tensor:
        """The part of a map (t, rows, columns, C) of a segment that is divided, (t, h, w, C)."""
        (top, bottom), (left, right) = (
            (round(first * n), max(round(last * n), round(first * n) + 1))
            for (first, last), n in zip(self.windows[segment], states.shape[1:3], strict=True)
        )
        return states[:, top:bottom, left:right]

    def table(self) -> Tensor:
        """(rectangles, tokens of the largest) int64: the tokens of each, central ones first, then -1."""
        rank = self.rank()
        out = self.order.new_full((len(self.sizes), int(rank.max()) + 1 if len(rank) else 0), -1)
        out[self.group[self.order], rank] = self.order
        return out

    def selection(self, features: Sequence[Tensor], order: RepeatOrder = "place") -> Selection:
        """The tokens of all rectangles at their central tokens; of several frames each at one of its own.

        Args:
            features: per segment (frames, rectangles, d).
            order: "place" puts the frames of a rectangle side by side. The others divide the places anew:
                "tile" puts one frame of a segment after the other, "repeat" the first frame of all segments
                before the second ones.
        """
        tables = self.table().split([rows * columns for rows, columns in self.grids])
        at = [t[:, : len(f)].T for t, f in zip(tables, features, strict=True)]  # (frames, rectangles)
        filled = [p >= 0 for p in at]
        if order == "repeat":
            frames = range(max(map(len, at), default=0))
            rows = [f[i][m[i]] for i in frames for f, m in zip(features, filled, strict=True) if i < len(f)]
        else:
            rows = [f[m] for f, m in zip(features, filled, strict=True)]
        mine = [p[m] for p, m in zip(at, filled, strict=True)]
        places = torch.cat([p.sort().values for p in mine] if order == "tile" else mine)
        if order == "repeat":
            places = places.sort().values
        by_place = places.argsort()
        return Selection(places[by_place], features=torch.cat(rows)[by_place])


def pooled(tokens: VisualTokens, most: Sequence[int]) -> Pooled:
    """Divide every segment's grid into at most so many rectangles; of a padded crop only what is fed."""
    fed = tokens.fed_cells
    group_of_cell, distance, grids, windows, groups, start = [], [], [], [], 0, 0
    for segment, count in zip(tokens.segments, most, strict=True):
        down, across = window_of(fed[start : start + segment.size].view(segment.grid), segment)
        rows, columns = pooled_grid((len(down), len(across)), count) if count else (0, 0)
        y, dy = blocks_of(down, rows, segment.grid[0])
        x, dx = blocks_of(across, columns, segment.grid[1])
        block = (y[:, None] * columns + x[None]).flatten() + groups
        group_of_cell.append(block if count else torch.full_like(block, -1))
        distance.append((dy[:, None] ** 2 + dx[None] ** 2).flatten())
        grids.append((rows, columns))
        lines = zip((down, across), segment.grid, strict=True)
        windows.append(
            tuple((int(x[0]) / n, (int(x[-1]) + 1) / n) if len(x) else (0.0, 1.0) for x, n in lines)
        )
        groups, start = groups + rows * columns, start + segment.size
    patches = tokens.patch_rows
    group = torch.full((len(tokens),), -1, device=tokens.cells.device)
    group[patches] = torch.cat(group_of_cell)[tokens.cells[patches]]
    patches = patches[group[patches] >= 0]
    away = torch.cat(distance)[tokens.cells[patches]]
    order = torch.argsort(group[patches] * (int(away.max()) + 1 if len(away) else 1) + away, stable=True)
    return Pooled(grids, group, patches[order], windows)
