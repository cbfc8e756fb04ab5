"""Shared arithmetic of strategies that work per segment, merge tokens or change their order."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.reference import full_precision
from ...selection import Selection
from ...tokens import VisualTokens

TIE = 1e-6  # cosines closer than this are a tie, which the lower index wins
Layout = Literal["spatial", "reference"]
KERNEL_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)


def rows_per_segment(tokens: VisualTokens) -> list[Tensor]:
    """Per segment the tokens made of its cells, (fed,) int64 ascending; their cells ascend as well."""
    segment_of = tokens.segment_of
    sizes = torch.bincount(segment_of + 1, minlength=len(tokens.segments) + 1).tolist()
    return list(segment_of.argsort(stable=True).split(sizes))[1:]


def local_cells(tokens: VisualTokens, rows: list[Tensor]) -> list[Tensor]:
    """Per segment the cells of its tokens, (fed,) int64, numbered from the segment's first."""
    out, start = [], 0
    for segment, mine in zip(tokens.segments, rows, strict=True):
        out.append(tokens.cells[mine] - start)
        start += segment.size
    return out


def unit(x: Tensor) -> Tensor:
    """Rows of length 1 in float32, in float64 of such; a zero row stays zero."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=1e-12)


@full_precision
def cosines(x: Tensor, y: Tensor) -> Tensor:
    """(..., n, m) of x (..., n, d) and y (..., m, d), in float32 under autocast too."""
    return unit(x) @ unit(y).mT


def gaussian_similarity(y: Tensor, centre: Tensor) -> Tensor:
    """(...,) sum over the kernel widths w of `exp(-|y - centre|^2 / (2 w))`.

    y is (..., d); centre broadcasts with it.
    """
    distance = (y - centre).square().sum(-1)
    return sum((torch.exp(distance / (-2 * w)) for w in KERNEL_WIDTHS), torch.zeros_like(distance))


def nearest(x: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Index of the target with the highest cosine, (n,) int64; x (n, d), targets (m, d), m at least 1."""
    targets, found = unit(targets).mT, []
    for rows in x.split(chunk):
        cosine = unit(rows) @ targets
        found.append((cosine >= cosine.amax(-1, keepdim=True) - TIE).int().argmax(-1))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long, device=x.device)


def in_order(selection: Selection, order: Tensor, n: int) -> Selection:
    """The same features in another order: kept token `order[j]` moves to the place of the j-th kept token.

    Args:
        selection: of n tokens, k of them kept.
        order: (k,) int64, a permutation.
    """
    keep, device = selection.keep, selection.keep.device
    places = torch.arange(len(keep), device=device)
    into = torch.full((n,), -1, device=device) if selection.into is None else selection.into.clone()
    weight = torch.zeros(n, device=device) if selection.weight is None else selection.weight.clone()
    alone = torch.ones(len(keep), dtype=torch.bool, device=device)
    alone[into[into >= 0]] = False
    into[keep[alone]], weight[keep[alone]] = places[alone], 1.0
    moved = torch.empty_like(order)
    moved[order] = places
    return Selection(keep, torch.where(into >= 0, moved[into.clamp(min=0)], -1), weight)


def mean_of_runs(item: Tensor, separator: Tensor, stride: int, keep_separators: bool) -> Selection:
    """Runs of `stride` neighbouring tokens become their means, each at the place of its middle token.

    Args:
        item: (n,) int64, the image or video of each token; no run spans two of them, and what is left over of
            one goes, unless it is all there is.
        separator: (n,) bool, tokens that are in no run.
    """
    keep, owner = separator & keep_separators, torch.full_like(item, -1)
    for i in item.unique().tolist():
        rows = ((item == i) & ~separator).nonzero()[:, 0]
        runs = max(1, len(rows) // stride)
        rows = rows[: runs * stride]
        centre = (
            torch.arange(len(rows), device=rows.device) // stride * stride + (min(stride, len(rows)) - 1) // 2
        )
        owner[rows] = rows[centre]
        keep[rows[centre]] = True
    alone = (separator & keep).nonzero()[:, 0]
    owner[alone] = alone
    return Selection.merge(keep.nonzero()[:, 0], owner)
