"""Matchings between tokens of a sequence: who joins whom, without iterations."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import bipartite_match, merge_weighted
from .grouping import unit


def join(x: Tensor, sources: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    """(rows, n) int64: the place in `keep` of every token; a source takes that of its most similar target.

    Args:
        x: (rows, n, d), compared by cosine.
        sources, targets: (rows, a) and (rows, b) int64; targets are among `keep`.
        keep: (rows, m) int64, all tokens that are no sources.
    """
    rows, n = x.shape[:2]
    unit_x = unit(x)
    a, b = (unit_x.gather(1, i[..., None].expand(-1, -1, x.shape[2])) for i in (sources, targets))
    best = (a @ b.mT).argmax(-1)
    places = torch.arange(keep.shape[1], device=x.device).expand(rows, -1)
    into = keep.new_full((rows, n), -1).scatter(1, keep, places)
    return into.scatter(1, sources, into.gather(1, targets.gather(1, best)))


def kth_match(keys: Tensor, k: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Groups of k consecutive patch tokens, the last of each absorbing: `keep` and `into` of an EncoderMerge.

    The (n - prefix) mod k tokens at the end are dropped.
    """
    rows, n, _ = keys.shape
    whole = (n - prefix) // k * k
    places = torch.arange(n, device=keys.device)
    patches = places[prefix : prefix + whole]
    last = (patches - prefix) % k == k - 1
    keep = torch.cat([places[:prefix], patches[last]]).expand(rows, -1)
    sources, targets = patches[~last].expand(rows, -1), patches[last].expand(rows, -1)
    return keep, join(keys, sources, targets, keep)


def merge_down(x: Tensor, size: Tensor, limit: int) -> Tensor:
    """Bipartite matchings, one after the other, until `limit` tokens are left.

    Args:
        x: (n, d), compared by cosine; merged tokens are means weighted by `size`.
        size: (n,) float32, patches that each token stands for.

    Returns:
        (n,) int64, for every token the one whose group it joins; that one joins itself.
    """
    standing = rank = torch.arange(len(x), device=x.device)
    x, size = x[None], size[None]
    while x.shape[1] > max(1, limit):
        match = bipartite_match(x, x.shape[1] - limit)
        x, size = merge_weighted(x, match, size)
        rank, standing = match.owner[0][rank], standing[match.keep[0]]
    return standing[rank]
