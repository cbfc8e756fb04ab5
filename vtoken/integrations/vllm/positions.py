"""Positions of kept tokens.

Which tokens stay is known after the vision tower, so their positions travel as columns of their embeddings.
Text has its final positions before, because the extent of an image does not depend on what is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

DIGIT = 128  # numbers below it are exact in bfloat16, whole positions above 256 are not
DIGITS = 3
COLUMNS = 3 * DIGITS  # of three rows
LARGEST = DIGIT**DIGITS - 1


def line_positions(n: int) -> Tensor:
    """(3, n) int64: one-dimensional positions, three times."""
    return torch.arange(n).expand(3, n)


def grid_positions(frames: int, height: int, width: int, step: float = 1.0) -> Tensor:
    """(3, frames * height * width) int64: time, row and column of every cell, from the grid's own start.

    Args:
        step: positions from one frame to the next, before they are truncated.
    """
    t, h, w = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([(t * step).long(), h, w]).flatten(1)


def extent(positions: Tensor) -> int:
    """The number of positions that an image or video takes, from its positions (3, n)."""
    return int(positions.max()) + 1 if positions.numel() else 0


def attach(features: Tensor, positions: Tensor) -> Tensor:
    """(k, d + COLUMNS): features (k, d) with positions (3, k) as columns, in three digits each.

    Raises:
        ValueError: for a position above LARGEST.
    """
    p = positions.to(features.device).T
    if p.numel() and int(positions.max()) > LARGEST:
        raise ValueError(
            f"An image or video has {int(positions.max()) + 1} positions, at most {LARGEST + 1} fit."
        )
    digits = [(p // DIGIT**i % DIGIT).to(features.dtype) for i in range(DIGITS)]
    return torch.cat([features, *digits], 1)


def detach(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Features (k, d) and positions (3, k) of what `attach` joined."""
    digits = embeddings[:, -COLUMNS:].float().round().long().T
    positions = sum(digits[3 * i : 3 * i + 3] * DIGIT**i for i in range(DIGITS))
    return embeddings[:, :-COLUMNS], positions  # type: ignore[return-value]


def runs_of(marked: Tensor) -> list[tuple[int, int]]:
    """First and one past the last place of every run of True in a mask (n,)."""
    steps = marked.int().diff(prepend=torch.zeros(1).int(), append=torch.zeros(1).int())
    firsts, lasts = ((steps == s).nonzero()[:, 0].tolist() for s in (1, -1))
    return list(zip(firsts, lasts, strict=True))


def prompt_positions(n: int, items: Iterable[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """Positions (3, n) of a prompt before anything is encoded, and the distance to those of later tokens.

    The kept tokens of an image or video have the position at which it starts.

    Args:
        n: tokens of the shortened prompt.
        items: per run of kept tokens its first one, their number and the positions that they take.

    Returns:
        The positions, and the number to add to the index of a later token for its position.
    """
    positions, at, start = torch.empty(n, dtype=torch.int64), 0, 0
    for offset, kept, reach in sorted(items):
        positions[at:offset] = torch.arange(start, start + offset - at)
        start += offset - at
        positions[offset : offset + kept] = start
        at, start = offset + kept, start + reach
    positions[at:] = torch.arange(start, start + n - at)
    return positions.expand(3, n).clone(), start - at
