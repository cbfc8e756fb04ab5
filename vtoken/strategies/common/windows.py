"""Square windows of a grid, and merging those whose tokens are alike."""

from __future__ import annotations

import torch
from torch import Tensor

from ...selection import EncoderMerge
from .grouping import unit


def window_cells(grid: tuple[int, int], window: int, device: torch.device | str | None = None) -> Tensor:
    """(windows, window^2) int64: cells of the whole windows that tile a grid from its top left."""
    rows, columns = grid
    cells = torch.arange(rows * columns, device=device).view(rows, columns)
    tiles = (
        cells.unfold(0, window, window).unfold(1, window, window) if min(grid) >= window else cells[:0, :0]
    )
    return tiles.reshape(-1, window * window)


def similar_windows(x: Tensor) -> Tensor:
    """Mean pairwise cosine of (..., m, d) over the m tokens of a window, (...)."""
    m = x.shape[-2]
    # the squared length of a sum of unit vectors is the sum of all their cosines, m of which are 1
    return (unit(x).sum(-2).square().sum(-1) - m) / (m * (m - 1))


def merge_windows(
    x: Tensor, grid: tuple[int, int], window: int, threshold: float, prefix: int = 0
) -> EncoderMerge | None:
    """Replace alike windows of (segments, n, d) by their means; None if a segment has none.

    Of every segment the r most alike windows, r being the smallest number that any segment has above the
    threshold. `prefix` tokens that stay as they are come before the n in the answer.
    """
    cells = window_cells(grid, window, x.device)
    if not len(cells):
        return None
    likeness = similar_windows(x[:, cells])
    r = int((likeness >= threshold).sum(1).min())
    if r == 0:
        return None
    (segments, n, _), m = x.shape, cells.shape[1]
    chosen = cells[likeness.sort(dim=1, descending=True, stable=True).indices[:, :r]]
    centre = chosen[..., window // 2 * window + window // 2]
    owner = torch.arange(n, device=x.device).repeat(segments, 1)
    owner.scatter_(1, chosen.flatten(1), centre.repeat_interleave(m, 1))
    kept = owner == torch.arange(n, device=x.device)
    keep = kept.nonzero()[:, 1].view(segments, n - r * (m - 1))
    weight = torch.ones(segments, n, device=x.device).scatter_(1, chosen.flatten(1), 1 / m)
    into = (kept.long().cumsum(1) - 1).gather(1, owner)
    first = torch.arange(prefix, device=x.device).expand(segments, -1)
    weight = torch.nn.functional.pad(weight, (prefix, 0), value=1.0)
    return EncoderMerge(torch.cat([first, keep + prefix], 1), torch.cat([first, into + prefix], 1), weight)
