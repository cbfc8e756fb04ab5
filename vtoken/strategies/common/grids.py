"""Grids of cells divided into nearly equal rectangles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...tokens import Segment


def window_of(fed: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """Rows and columns of the smallest rectangle around the cells that are fed; all where all are."""
    if segment.fed == segment.size:
        return torch.arange(fed.shape[0], device=fed.device), torch.arange(fed.shape[1], device=fed.device)
    down, across = fed.any(1).nonzero()[:, 0], fed.any(0).nonzero()[:, 0]
    if not len(down):
        return down, across
    return (
        torch.arange(int(down[0]), int(down[-1]) + 1, device=fed.device),
        torch.arange(int(across[0]), int(across[-1]) + 1, device=fed.device),
    )


def blocks_of(lines: Tensor, blocks: int, size: int) -> tuple[Tensor, Tensor]:
    """Block of every one of `size` lines, and its distance from the block's middle.

    `lines` are divided into blocks; the others lie in block 0.
    """
    block, distance = torch.zeros(2, size, dtype=torch.long, device=lines.device)
    if blocks:
        at = torch.arange(len(lines), device=lines.device)
        mine = at * blocks // len(lines)
        count = torch.bincount(mine, minlength=blocks)
        block[lines], distance[lines] = mine, at - (count.cumsum(0) - count + (count - 1) // 2)[mine]
    return block, distance


def pooled_grid(grid: tuple[int, int], budget: int) -> tuple[int, int]:
    """Rows and columns of the pooled grid, of nearly square cells: at most `budget`, at least 1 x 1."""
    height, width = grid
    best = (1, 1)
    ideal = math.sqrt(budget * height / width)
    for rows in {max(1, min(height, r)) for r in (math.floor(ideal), math.ceil(ideal))}:
        candidate = (rows, max(1, min(width, budget // rows)))
        if math.prod(candidate) <= budget and math.prod(candidate) > math.prod(best):
            best = candidate
    return best
