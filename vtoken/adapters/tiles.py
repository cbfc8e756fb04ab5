"""Join tiles into images, for families whose prompt, and not whose features, groups the tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..tokens import Segment, VisualTokens


def crop_at(row: int, column: int, rows: int, columns: int, grid: tuple[int, int]) -> Segment:
    """A crop of an image that is cut into so many rows and columns of equal crops."""
    box = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
    return Segment("crop", grid, (row, column), box=box)


def join_tiles(
    tiles: Sequence[VisualTokens], segments: Sequence[Segment], order: Sequence[int]
) -> VisualTokens:
    """Join tiles into one image.

    Args:
        tiles: in token order, with one segment each.
        segments: the segments of the tiles, in the order of strategies.
        order: `order[i]` is the tile of `segments[i]`.
    """
    start, first = [0] * len(tiles), 0
    for segment, i in zip(segments, order, strict=True):
        start[i], first = first, first + segment.size
    cells = [torch.where(t.cells < 0, -1, t.cells + s) for t, s in zip(tiles, start, strict=True)]
    return VisualTokens(
        features=torch.cat([t.features for t in tiles]),
        segments=tuple(segments),
        cells=torch.cat(cells),
        tower=tiles[0].tower,
        modality=tiles[0].modality,
        memory=tiles[0].memory,
        provided={key: torch.cat([tiles[i]._get(*key) for i in order]) for key in tiles[0].provided},
    )


def join_until(tiles: Sequence[VisualTokens], last: Sequence[bool]) -> list[VisualTokens]:
    """Join tiles into images without places for the tiles; `last[i]` says whether tile i ends an image."""
    images, first = [], 0
    for i, ends in enumerate(last, 1):
        if ends:
            mine = tiles[first:i]
            images.append(join_tiles(mine, [t.segments[0] for t in mine], range(len(mine))))
            first = i
    return images


def join_images(images: Sequence[VisualTokens]) -> VisualTokens:
    """The images of a prompt as frames of one video; an image in crops gives the view of the whole."""
    start = [0]
    for image in images:
        start.append(start[-1] + image.num_cells)
    cells = [torch.where(x.cells < 0, -1, x.cells + s) for x, s in zip(images, start, strict=False)]
    segments = [
        s if s.kind == "crop" else replace(s, kind="frame") for image in images for s in image.segments
    ]
    pixels = [x.pixels for x in images if x.pixels is not None]
    return replace(
        images[0],
        features=torch.cat([x.features for x in images]),
        segments=tuple(segments),
        cells=torch.cat(cells),
        provided={},
        pixels=torch.cat(pixels) if pixels else None,
    )


def runs_of(places: Tensor) -> list[tuple[int, int]]:
    """First place and length of every unbroken run in ascending places."""
    at = places.tolist()
    starts = [i for i in range(len(at)) if i == 0 or at[i] != at[i - 1] + 1]
    return [(at[i], j - i) for i, j in zip(starts, [*starts[1:], len(at)], strict=True)]


def shuffled_pool(shuffle: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """(..., patches) -> (..., cells), the mean over the patches that a pixel shuffle gathers in a cell.

    Args:
        shuffle: the model's own function, (1, patches, 1) -> (..., patches per cell) with one row per cell;
            patch indices are pushed through it.
    """
    index = torch.arange(value.shape[-1], dtype=torch.float64).view(1, -1, 1)
    groups = shuffle(index)
    return value[..., groups.flatten(0, -2).long().to(value.device)].mean(-1)
