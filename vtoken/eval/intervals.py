"""Confidence intervals of accuracies."""

from __future__ import annotations

import math

Z95 = 1.959963984540054


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of `right` out of `asked`, within [0, 1].

    Raises:
        ValueError: unless 0 <= right <= asked and asked > 0.
    """
    if not 0 <= right <= asked or asked < 1:
        raise ValueError(f"A share needs 0 <= right <= asked and asked > 0, found {right} of {asked}.")
    share, square = right / asked, Z95 * Z95 / asked
    centre = (share + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(share * (1 - share) / asked + square / (4 * asked))
    return (0.0 if right == 0 else centre - half), (1.0 if right == asked else centre + half)
