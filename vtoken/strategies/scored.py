"""ScoredStrategy: the highest scores of every image, crop or frame stay; a method writes the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ..selection import Selection
from ..tokens import VisualTokens
from .base import Strategy, top_k
from .common.grouping import local_cells, rows_per_segment

Scores = Tensor | tuple[Tensor, Sequence[int]]


@dataclass
class ScoredStrategy(Strategy):
    """Base of the methods that rank the patches of every segment and keep the highest: write `scores`.

    The budget of each segment, padding, and the order of the answer are taken care of.

    Args:
        keep_newline: keep image-newline and separator tokens, on top of the budget.
    """

    _: KW_ONLY
    keep_newline: bool = False

    def scores(self, tokens: VisualTokens) -> Scores:
        """Scores of the cells.

        Returns:
            (segments, cells) in any float dtype, the highest stay and the lower cell among equals. Cells that
            the model throws away are passed over, and so are columns after a smaller segment's last cell;
            `tokens.by_cell` brings (n,) scores of tokens into this shape. Where the picture decides how many
            tokens a segment keeps: these scores and the numbers, one per segment, instead of `counts`; with
            `static_counts = False`.
        """
        raise NotImplementedError(f"{type(self).__name__} must write scores.")

    def select(self, tokens: VisualTokens) -> Selection:
        answer = self.scores(tokens)
        scores, counts = answer if isinstance(answer, tuple) else (answer, self.counts(tokens.segments))
        _check(scores, tokens, type(self).__name__)
        rows = rows_per_segment(tokens)
        kept = [tokens.separator_rows] if self.keep_newline else []
        of_tokens = scores.new_full((len(tokens),), torch.inf if self.keep_newline else -torch.inf)
        for row, mine, cells, count in zip(scores, rows, local_cells(tokens, rows), counts, strict=True):
            kept.append(mine[top_k(row[cells], count)])
            of_tokens[mine] = row[cells]
        _check_numbers(of_tokens, type(self).__name__)
        return Selection(torch.cat(kept).sort().values, scores=of_tokens)


def _check_numbers(scores: Tensor, name: str) -> None:
    """Raise ValueError if a score is nan, which would be sorted as the highest."""
    if not torch.compiler.is_compiling() and (bad := int(scores.isnan().sum())):
        raise ValueError(
            f"scores of {name} must be numbers, found nan for {bad} of {len(scores)} tokens: a division by"
            " zero, or features that are nan?"
        )


def _check(scores: Tensor, tokens: VisualTokens, name: str) -> None:
    """Raise ValueError unless `scores` has one row per segment and a column for each of its cells."""
    segments, cells = len(tokens.segments), max(s.size for s in tokens.segments)
    if scores.ndim != 2 or len(scores) != segments or scores.shape[1] < cells:
        raise ValueError(
            f"scores of {name} must give ({segments}, {cells}), a number for every cell of every segment,"
            f" found {tuple(scores.shape)}: tokens.by_cell(scores) does it for scores of the {len(tokens)}"
            " tokens."
        )
