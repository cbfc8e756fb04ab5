"""Geometry of images that are cut into crops, and of pooled video frames.

The cell of a token is not derived here: patch coordinates pass through the model's own
`pack_image_features`, so that unpadding and shrinking of the canvas are the model's by construction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tokens import Segment
from .base import Layout

Box = tuple[float, float, float, float]


def canvas_box(size: tuple[int, int], canvas: tuple[int, int]) -> Box:
    """Region of the original image on a canvas to which it was fitted, centred; sizes (height, width), px."""
    (height, width), (tall, wide) = size, canvas
    across, down = wide / width, tall / height
    if across < down:
        new_height, new_width = min(math.ceil(height * across), tall), wide
    else:
        new_height, new_width = tall, min(math.ceil(width * down), wide)
    left, top = (wide - new_width) // 2, (tall - new_height) // 2
    return -left / new_width, -top / new_height, (wide - left) / new_width, (tall - top) / new_height


def square_box(size: tuple[int, int]) -> Box:
    """Region of the original image on the square to which it was padded, centred."""
    return canvas_box(size, (max(size), max(size)))


def part(box: Box, place: tuple[int, int], grid: tuple[int, int]) -> Box:
    """The box of one field of a (rows, columns) grid over a box."""
    (x0, y0, x1, y1), (row, column), (rows, columns) = box, place, grid
    width, height = (x1 - x0) / columns, (y1 - y0) / rows
    return x0 + column * width, y0 + row * height, x0 + (column + 1) * width, y0 + (row + 1) * height


def tile_rows(side: int, first: int) -> Tensor:
    """(rows, 2) float64: (y, x) of every row of a tile of side x side patches at the projector.

    `first` is 0 if these are the patches, -1 if a CLS row precedes them (it gets -1, -1), 1 if the model
    takes the first patch for a CLS row and drops it.
    """
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rows = torch.stack([y, x], -1).view(-1, 2).double()
    return torch.cat([torch.full((1, 2), -1.0, dtype=torch.float64), rows]) if first < 0 else rows[first:]


def anyres_layout(
    base: Any,
    size: tuple[int, int],
    canvas: tuple[int, int] | None,
    side: int,
    first: int = 0,
    **options: Any,
) -> Layout:
    """Layout of an image that is a thumbnail and a canvas of crops, or a single tile.

    A token of a canvas that the model shrank (LLaVA-OneVision, bilinear) belongs to the cell nearest to its
    centre, the lower of two; the cells between the centres have no token.

    Args:
        base: has `pack_image_features` and a vision config.
        size: (height, width) of the original image, px.
        canvas: (height, width) of the canvas, px; None for a single tile, padded to a square.
        side: patches along one side of a tile.
        first: see `tile_rows`.
        options: further arguments of `pack_image_features`.
    """
    pixels = base.config.vision_config.image_size
    rows, columns = (0, 0) if canvas is None else (canvas[0] // pixels, canvas[1] // pixels)
    places = [(r, c) for r in range(rows) for c in range(columns)]
    tile = tile_rows(side, first)
    # (0, y, x) on the thumbnail, (1, y, x) on the canvas, (-1, -1, -1) for rows that are no patch
    shown = torch.nn.functional.pad(tile, (1, 0)).masked_fill(tile[:, :1] < 0, -1.0)
    tiles = [shown] + [shown + torch.tensor([1.0, r * side, c * side]) for r, c in places]
    packed = base.pack_image_features(
        [torch.stack(tiles)],
        [list(size)],
        image_newline=torch.full((3,), -1.0, dtype=torch.float64),
        **options,
    )[0][0]
    kind, y, x = (packed + 0.5 - 1e-6).floor().long().unbind(1)
    crop = y.div(side, rounding_mode="floor") * columns + x.div(side, rounding_mode="floor")
    cells = torch.where(kind > 0, 1 + crop, 0) * side**2 + y % side * side + x % side
    cells = torch.where(kind < 0, -1, cells)
    shrink = _step(packed[kind > 0])
    fed = torch.bincount(cells[cells >= 0] // side**2, minlength=1 + len(places)).tolist()
    grid = (side, side)
    if canvas is None:
        return Layout([Segment("image", grid, box=square_box(size), tokens=fed[0])], cells)
    box = canvas_box(size, canvas)
    segments = [Segment("thumbnail", grid, tokens=fed[0])]
    for place, tokens in zip(places, fed[1:], strict=True):
        field = part(box, place, (rows, columns))
        segments.append(Segment("crop", grid, place, box=field, tokens=tokens, shrink=shrink))
    return Layout(segments, cells)


def _step(canvas: Tensor) -> float:
    """Cells between neighbouring tokens of a canvas, rows of (kind, y, x); the larger of both directions."""
    lines = [canvas[:, i].mul(1e6).round().unique() for i in (1, 2)]
    return max([float(v[-1] - v[0]) / 1e6 / (len(v) - 1) for v in lines if len(v) > 1], default=1.0)


def frames_layout(
    frames: int, grid: tuple[int, int], leading: int = 0, trailing: int = 0, box: Box = (0.0, 0.0, 1.0, 1.0)
) -> Layout:
    """Layout of a video: per frame `leading` rows that are no patch, then cells; `trailing` rows last."""
    per_frame = grid[0] * grid[1]
    cells = torch.arange(frames * per_frame).view(frames, per_frame)
    cells = torch.nn.functional.pad(cells, (leading, 0), value=-1).flatten()
    return Layout(
        [Segment("frame", grid, box=box)] * frames, torch.nn.functional.pad(cells, (0, trailing), value=-1)
    )


def best_canvas(size: tuple[int, int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The configured (height, width) that processor and model choose for an image."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size, pinpoints)
    return int(height), int(width)


def frame_count(arguments: dict[str, Any]) -> int:
    """Frames per video of a `get_video_features` call; older releases name its pixels `pixel_values` too."""
    pixels = arguments.get("pixel_values_videos")
    return int((arguments["pixel_values"] if pixels is None else pixels).shape[1])
