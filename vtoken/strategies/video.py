"""VideoStrategy: base of the methods that divide one budget over the frames of a video by their content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ..selection import Selection
from ..tokens import Needs, Segment, TowerInfo, VisualTokens
from .base import Strategy, top_k


@dataclass
class VideoStrategy(Strategy):
    """Base of methods for videos with equal frames: the grids tell what a video keeps, not what a frame does.

    Args:
        keep_newline: keep newline and separator tokens, on top of the budget.
    """

    _: KW_ONLY
    keep_newline: bool = True
    segments_compete = True

    def needs(self, tower: TowerInfo | None) -> Needs:
        return Needs(modalities=("video",))

    def frames(self, tokens: VisualTokens) -> Tensor:
        """(T, M, d) features of T frames of M tokens, the model's dtype, without separators.

        Raises:
            ValueError: for frames of different sizes.
        """
        sizes = {s.fed for s in tokens.segments}
        if len(sizes) != 1:
            raise ValueError(
                f"{self.info.name} needs frames of equal size, found {sorted(sizes)} tokens: use divprune."
            )
        return tokens.features[tokens.patch_rows].view(len(tokens.segments), sizes.pop(), -1)

    def ranked(self, tokens: VisualTokens, scores: Tensor, count: int) -> Selection:
        """The `count` of all patches with the highest scores (T, M), and the separators that stay."""
        rows = tokens.patch_rows
        of_tokens = scores.new_full((len(tokens),), torch.inf if self.keep_newline else -torch.inf)
        of_tokens[rows] = scores.flatten()
        keep = torch.cat([rows[top_k(of_tokens[rows], count)], self.newlines(tokens)])
        return Selection(keep.sort().values, scores=of_tokens)

    def newlines(self, tokens: VisualTokens) -> Tensor:
        """(s,) int64, the separators that stay."""
        return tokens.separator_rows[: len(tokens) if self.keep_newline else 0]

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int | None:
        equal = len({s.fed for s in segments}) == 1
        return super()._total_kept(segments, separators) if equal else None
