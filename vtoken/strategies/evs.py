"""EVS: drop the tokens of a video that hardly differ from the frame before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..selection import Selection
from ..tokens import Segment, VisualTokens
from .budgets import divide
from .common.grouping import unit
from .registry import register
from .video import VideoStrategy


@register(
    "evs",
    summary="Keep the first frame, and of the others the tokens that differ most from the frame before.",
    stages=("projector",),
    paper="Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference, arXiv "
    "2510.14624",
    code="github.com/vllm-project/vllm",
    code_licence="Apache-2.0, with a notice of NVIDIA",
    differs="Distances are float32 and exactly 0 between equal tokens, the code uses the model's dtype "
    "(exact_dtype=True); a stream goes on from the last frame of the call before; kept tokens have their "
    "own positions.",
)
@dataclass
class EVS(VideoStrategy):
    """Efficient Video Sampling (arXiv 2510.14624), the pruning of serving engines, for videos only.

    Of a video of T frames of M tokens, `max(M, floor(T M (1 - q)))` stay, q being `1 - budget`: those with
    the largest `1 - cos` to the token at the same place one frame before, whether that one is kept or not;
    among equals the earlier. The first frame is whole, so that a budget below 1/T keeps M tokens. In a stream
    (`vtoken.stream`, `vtoken.StreamSession`) this is its first frame; each later call compares with the call
    before and keeps `floor(T M (1 - q))` of its own tokens, 1 at least.

    Args:
        q: pruning rate in [0, 1) as engines take it, in place of `budget`, which becomes `1 - q`.
        exact_dtype: compute the cosine in the dtype of the features, as the code does.
    """

    budget: float | int = 0.3
    q: float | None = None
    exact_dtype: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        before = self.__dict__.get("_of_q", EVS.budget)  # what an earlier q made of the budget
        if self.q is not None:
            if not 0 <= self.q < 1 or self.budget not in (before, 1 - self.q):
                raise ValueError(f"q must lie in [0, 1), without budget, found {self.q} and {self.budget}.")
            self.budget = self.__dict__["_of_q"] = 1 - self.q

    def with_budget(self, budget: float | int) -> EVS:
        return replace(self, budget=budget, q=None)

    def _kept(self, frames: int, size: int, first: bool = True, budget: float | int | None = None) -> int:
        """Tokens that stay, rounded as engines round; `first`: the first frame has none before it."""
        allowance, n = self.allowance(budget), frames * size
        allowed = n * (1 - (1 - allowance.value)) if allowance.is_share else allowance.allowed(n, frames)
        return min(n, max(size if first else 1, int(allowed)))

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens per frame if all frames but the first change equally; the sum is exact."""
        first, *others = [s.fed for s in segments]
        return [first, *divide(self._kept(len(segments), first, True, budget) - first, others)]

    def select(self, tokens: VisualTokens) -> Selection:
        x = self.frames(tokens)
        before = tokens.memory.get("frame")
        if before is not None and before.shape != x[0].shape:
            raise ValueError(
                f"A stream has one size, found {len(before)} and {len(x[0])} tokens: start anew."
            )
        tokens.memory["frame"] = x[-1].detach().clone()
        x = torch.cat([x[:1] if before is None else before.to(x)[None], x])
        change = unit(x).diff(dim=0).square().sum(-1) / 2  # 1 - cos, without its rounding
        if self.exact_dtype:
            change = 1 - torch.cosine_similarity(x[1:], x[:-1], dim=-1)
        if before is None:
            change[0] = torch.inf
        return self.ranked(tokens, change, self._kept(len(change), change.shape[1], before is None))
