"""Ranks and scores of retrieval from a matrix of similarities, plain and with dual softmax."""

from __future__ import annotations

from typing import Any

import numpy as np

RECALLS = (1, 5, 10)


def ranks(similarity: np.ndarray) -> np.ndarray:
    """Rank of the right entry of each row, 0 the best: the number of entries that are strictly larger.

    Entries equal to the right one do not count against it: a tie is read in its favour. `ties` counts the
    rows where that happens.

    Args:
        similarity: (n, n) float; row i is query i, and its right entry is on the diagonal.

    Raises:
        ValueError: if the matrix is not square, is empty, or has values that are not finite.
    """
    return (_checked(similarity) > np.diagonal(similarity)[:, None]).sum(axis=1)


def ties(similarity: np.ndarray) -> int:
    """Number of rows in which another entry equals the right one."""
    return int(((_checked(similarity) == np.diagonal(similarity)[:, None]).sum(axis=1) > 1).sum())


def _checked(similarity: np.ndarray) -> np.ndarray:
    shape = similarity.shape
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"Ranks need a square matrix of similarities, found one of shape {shape}.")
    if not np.isfinite(similarity).all():
        raise ValueError("The similarities have values that are not finite, so that they have no ranks.")
    return similarity


def dual_softmax(similarity: np.ndarray, temperature: float) -> np.ndarray:
    """Similarities times a softmax over the queries (CAMoE, Cheng et al., arXiv 2109.04290).

    An entry that suits many queries loses weight. All queries are read together, which a search engine
    cannot do: scores with it and without it are not comparable.

    Args:
        similarity: (queries, entries) float.
        temperature: by which similarities are divided in the softmax; 0.01 is CLIP's.

    Raises:
        ValueError: unless the temperature is above 0.
    """
    if not temperature > 0:
        raise ValueError(f"The temperature of dual softmax is a number above 0, found {temperature!r}.")
    scaled = similarity / temperature
    weights = np.exp(scaled - scaled.max(axis=0, keepdims=True))
    return similarity * (weights / weights.sum(axis=0, keepdims=True))


def scores(similarity: np.ndarray) -> dict[str, Any]:
    """R@1, R@5 and R@10 in %, their sum, median and mean rank (1 the best), and tied queries.

    Args, errors: as `ranks`.
    """
    found = ranks(similarity)
    recalls = {f"R@{k}": 100 * float((found < k).mean()) for k in RECALLS}
    return {
        **recalls,
        "R-sum": sum(recalls.values()),
        "median rank": float(np.median(found)) + 1,
        "mean rank": float(found.mean()) + 1,
        "ties": ties(similarity),
    }
