"""Greedy selections of tokens, with their checks: max-min distance, determinantal point process, coverage."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, reference


def shape_of(t: Tensor) -> str:
    """The shape in words."""
    return "(" + ", ".join(map(str, t.shape)) + ")"


def farthest_point(features: Tensor, k: int, start: int | Tensor | None = None) -> Tensor:
    """Greedy max-min selection by cosine distance (DivPrune, arXiv 2503.02175).

    The first pick is the token farthest from its nearest other token, or `start` (int, or int (B,)); every
    next pick is the unselected token whose nearest selected token is farthest. Distances within 1e-6 tie, to
    the lower index.

    Args:
        features: (B, n, d). k: number of tokens, at most n.

    Returns (B, k) int64 in the order of selection (so the first j are the selection for j). O(n d) a step;
    the torch twin keeps the n x n cosines only while n <= d. A zero vector is at distance 1 from all. No
    gradient. Raises ValueError for shapes or counts that do not fit.
    """
    _check_selection("farthest_point", features, k)
    if isinstance(start, int):
        if features.shape[1] and not 0 <= start < features.shape[1]:
            raise ValueError(
                f"farthest_point starts at a token in 0 to {features.shape[1] - 1}; found {start}."
            )
        start = torch.full((features.shape[0],), start, device=features.device)
    elif start is not None:
        if start.shape != features.shape[:1]:
            raise ValueError(
                f"farthest_point takes start of shape ({features.shape[0]},); found {shape_of(start)}."
            )
        reference.check_index(start, 0, features.shape[1], "start")
        start = start.to(features.device, torch.long)
    return ops.farthest_point(features.detach(), k, start)


def greedy_map(features: Tensor, quality: Tensor, k: int) -> Tensor:
    """Greedy MAP inference of a determinantal point process (Chen et al. 2018, arXiv 1709.05135; CDPruner).

    The kernel is L = diag(quality) S diag(quality) with S the cosine similarity of the features; each step
    adds the token that multiplies det(L) of the selection most, by an incremental Cholesky factor of k rows.
    A token's gain is at least 1e-5 of its own quality squared, so quality decides once the rank of the
    features is used up. Gains within a factor of 1e-5 tie, to the lower index.

    Args:
        features: (B, n, d). quality: (B, n), not negative. k: number of tokens, at most n.

    Returns (B, k) int64 in the order of selection. No gradient. Raises ValueError for shapes or counts that
    do not fit.
    """
    _check_selection("greedy_map", features, k)
    if quality.shape != features.shape[:2]:
        raise ValueError(
            f"greedy_map takes quality of shape {tuple(features.shape[:2])}; found {shape_of(quality)}."
        )
    return ops.greedy_map(features.detach(), quality.detach(), k)


def greedy_cover(values: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """Greedy maximisation of coverage, a facility location function (SCOPE, arXiv 2510.24214).

    Token i covers thing j as well as `values[b, i, j]` says, a selection as well as its best token, and at
    least 0. Each step adds the token with the largest product of its weight and what it adds to the sum over
    all things. What exceeds the present coverage of a thing by less than 1e-6 of its largest value counts as
    nothing. Products within a factor of 1e-5 tie, to the lower index.

    Args:
        values: (B, n, m). k: number of tokens, at most n.
        weight: (B, n), not negative; 1 if not given.

    Returns (B, k) int64 in the order of selection (so the first j are the selection for j). The torch twin is
    lazy: gains only shrink, so that it computes those of a step's best candidates alone. No gradient. Raises
    ValueError for shapes or counts that do not fit.
    """
    if values.ndim != 3:
        raise ValueError(f"greedy_cover takes values (B, n, m); found {shape_of(values)}.")
    _check_selection("greedy_cover", values, k)
    if weight is None:
        weight = torch.ones(values.shape[:2], device=values.device)
    elif weight.shape != values.shape[:2]:
        raise ValueError(
            f"greedy_cover takes weight of shape {tuple(values.shape[:2])}; found {shape_of(weight)}."
        )
    return ops.greedy_cover(values.detach(), weight.detach(), k)


def _check_selection(name: str, features: Tensor, k: int) -> None:
    if features.ndim != 3:
        raise ValueError(f"{name} takes features (B, n, d); found {shape_of(features)}.")
    if not 0 <= k <= features.shape[1]:
        raise ValueError(
            f"{name} can select 0 to {features.shape[1]} of {features.shape[1]} tokens; found k = {k}."
        )
