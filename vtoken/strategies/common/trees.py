"""Segments of a video, diverse tokens of its frames, and trees of similar tokens over time (FlashVID)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budgets import divide_by
from .clusters import density_peaks
from .grouping import TIE


def segments_of(means: Tensor, threshold: float, least: int) -> list[range]:
    """Frames of every segment of a video.

    A segment ends where the cosine of successive `means` (T, d) is below `threshold`, and, until there are
    `least` segments, where it is lowest.
    """
    cosine = torch.cosine_similarity(means[:-1], means[1:], dim=-1)
    cuts = max(int((cosine < threshold).sum()), min(least, len(means)) - 1)
    ends = (cosine.sort(stable=True).indices[:cuts].sort().values + 1).tolist()
    return [range(first, end) for first, end in zip([0, *ends], [*ends, len(means)], strict=True)]


def diverse(y: Tensor, weight: Tensor, count: int) -> Tensor:
    """Greedy max-min selection in every frame by `1 - cos`, times the weight of the token to be added.

    The first token has the largest such distance to its nearest other; no token is chosen twice. Distances
    within 1e-6 count as 0, so that of equal tokens the lower index is chosen, however a cosine is rounded.

    Args:
        y: (T, M, d), rows of length 1. weight: (T, M), not negative. count: of each frame, M at most.

    Returns:
        (T, M) bool, `count` of each frame.
    """
    chosen = torch.zeros_like(weight, dtype=torch.bool)
    if not count:
        return chosen
    closest = torch.stack([(frame @ frame.mT).fill_diagonal_(-1).amax(0) for frame in y])
    distance, frames = torch.full_like(weight, torch.inf), torch.arange(len(y), device=y.device)
    pick = (weight * F.threshold(1 - closest, TIE, 0.0)).argmax(1)
    for _ in range(count - 1):
        chosen[frames, pick] = True
        distance = distance.minimum(1 - (y @ y[frames, pick, :, None])[..., 0])
        pick = (weight * F.threshold(distance, TIE, 0.0)).masked_fill(chosen, -torch.inf).argmax(1)
    chosen[frames, pick] = True
    return chosen


def trees(
    y: Tensor, free: Tensor, segments: Sequence[range], threshold: float, spare: int, exact: bool
) -> tuple[Tensor, Tensor]:
    """Trees over the frames of a segment: a token hangs on the most similar one of the frame before.

    Args:
        y: (T, M, d), rows of length 1. free: (T, M) bool, the tokens that hang and are hung on.
        threshold: cosine above which a token hangs.
        spare: tokens of a frame, the mean over a segment, that may hang: those with the highest cosines do.
        exact: False leaves out the last of them if there would be more, and its equals.

    Returns:
        Parent and root (T * M,) int64, tokens counted over all frames; -1 for no parent, a root is its own.
    """
    (frames, size), none = free.shape, -torch.inf
    parent, cosine = torch.full_like(free, -1, dtype=torch.long), torch.full_like(y[..., 0], none)
    for t in (t for segment in segments for t in segment[1:]):  # one pair of frames at a time
        best, at = (y[t] @ y[t - 1].mT).masked_fill_(~free[t - 1], none).max(1)
        cosine[t], parent[t] = best.clamp(max=1).masked_fill(~free[t], none), (t - 1) * size + at
    hangs = [_strongest(cosine[list(s)], threshold, len(s) * spare, exact) for s in segments]
    parent[~torch.cat(hangs)] = -1
    root = torch.arange(frames * size, device=y.device).view(frames, size)
    for t in range(1, frames):
        root[t] = torch.where(parent[t] >= 0, root.flatten()[parent[t]], root[t])
    return parent.flatten(), root.flatten()


def _strongest(values: Tensor, threshold: float, most: int, exact: bool) -> Tensor:
    """The `most` highest of the values above a threshold, see `trees`; bool of the shape of `values`."""
    above = values > threshold
    if int(above.sum()) <= most:
        return above
    high = values.flatten().sort(descending=True, stable=True)
    if not exact and most:
        return values > high.values[most - 1]
    return torch.zeros_like(above).flatten().index_fill_(0, high.indices[:most], True).view_as(above)


def cluster_roots(
    x: Tensor, root: Tensor, weight: Tensor, free: Tensor, segments: Sequence[range], most: int, exact: bool
) -> tuple[Tensor, Tensor]:
    """Clusters (density peaks) of the trees of every frame in whose segment there are too many.

    Args:
        x: (T, M, d). root, weight: (T * M,), the tree of every token, and its share there.
        free: (T, M) bool, the tokens in trees.
        most: trees of a frame that stay, the mean over a segment.
        exact: False rounds up in every frame.

    Returns:
        (T * M,) int64, of every token the root at whose place its tree's cluster stands, -1 for none; and
        (T * M,) float32, the share of its tree there.
    """
    (frames, size), device = free.shape, x.device
    standing = (free.flatten() & (root == torch.arange(len(root), device=device))).nonzero()[:, 0]
    centre, share = torch.full_like(root, -1), torch.ones(len(root), device=device)
    centre[standing] = standing
    sizes = torch.bincount(standing // size, minlength=frames).tolist()
    counts = [k for s in segments for k in _clusters_of(sizes[s.start : s.stop], most, exact)]
    if counts != sizes:
        merged = torch.zeros_like(x).flatten(0, 1).index_add_(0, root, x.flatten(0, 1) * weight[:, None])
    for rows, count in zip(standing.split(sizes), counts, strict=True):
        if not count:
            centre[rows] = -1
        elif count < len(rows):
            centres, cluster = density_peaks(merged[rows], count, 7)
            centre[rows] = rows[centres][cluster]
            share[rows] = 1 / torch.bincount(cluster)[cluster]
    return centre[root], share[root]


def _clusters_of(sizes: list[int], most: int, exact: bool) -> list[int]:
    """Clusters of each frame of a segment, whose frames have so many trees."""
    total, every = most * len(sizes), sum(sizes)
    if every <= total:
        return sizes
    if not exact or not total:
        return [math.ceil(n * total / every) for n in sizes]
    one = [min(n, 1) for n in sizes]  # no frame that has trees loses all of them
    rest, left = [max(0, n - 1) for n in sizes], total - sum(one)
    quotas = [n * left / sum(rest) for n in rest]
    return [k + more for k, more in zip(one, divide_by(quotas, left, rest), strict=True)]
