"""Warning for a language model that reads all visual tokens although a patched model was to drop some."""

from __future__ import annotations

import warnings
from collections import deque

import torch
from torch import Tensor

from .prompt import EncodedVisuals

REMEMBERED = 16  # calls of get_*_features


class Unread:
    """Features that left the model and may return inside ready-made embeddings; warns once.

    Args:
        name: the strategy's name.
    """

    def __init__(self, name: str) -> None:
        self.name, self.warned = name, False
        self.given: deque[Tensor] = deque(maxlen=REMEMBERED)  # per call the marks of its rows

    def note(self, encoded: EncodedVisuals) -> None:
        """Keep a mark, and not the features, of every row that was handed to the user."""
        if not self.warned and encoded.total:
            self.given.append(torch.cat([marks_of(item.features) for item in encoded.items]))

    def check(self, embeds: Tensor) -> None:
        """Warn if all rows of some features are among (B, q, d) embeddings without visual tokens."""
        marks = marks_of(embeds)
        if not self.warned and any(bool(torch.isin(g.to(marks.device), marks).all()) for g in self.given):
            self.warn()

    def warn(self) -> None:
        """Warn that nothing was saved, and say what would help."""
        self.given.clear()
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{self.name} saved no visual token: the language model read all features of this patched"
                " model inside ready-made embeddings, where vtoken does not see them. Pass input_ids and"
                " pixel_values and let the model merge them.",
                stacklevel=2,
            )


def marks_of(rows: Tensor) -> Tensor:
    """(..., d) -> (n,) int64, equal for equal rows of any floating-point type."""
    bits = rows.detach().reshape(-1, rows.shape[-1]).float().contiguous().view(torch.int32).long()
    factors = torch.arange(1, rows.shape[-1] + 1, device=rows.device) * 2654435761 + 1
    return (bits * factors).sum(-1)
