"""V-CAST: frames at which a video turns keep more tokens, inside a frame the unusual and long ones stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import Segment, VisualTokens
from .budgets import divide, divide_by
from .registry import register
from .scored import ScoredStrategy
from .video import VideoStrategy


@register(
    "v_cast",
    summary="Divide a video's budget by how sharply the path of frame means turns, keep the tokens unlike "
    "their frame and those of large norm.",
    stages=("projector",),
    paper="V-CAST: Video Curvature-Aware Spatio-Temporal Pruning for Efficient Video Large Language Models, "
    "arXiv 2603.27650",
    code="github.com/xinyouu/V-CAST",
    code_licence="MIT",
    differs="What rounding leaves goes one token to a frame, the code fills one frame first "
    "(leftover='published'); a video of one frame keeps its budget, the code leaves it whole; works on "
    "batches; the newline row after a video stays.",
)
@dataclass
class VCAST(VideoStrategy, ScoredStrategy):
    """Curvature-aware budgets and dual-anchor tokens (arXiv 2603.27650), for videos only.

    With `f_t` the normalised mean of the M tokens of frame t, `kappa_t = 1 - cos(f_t - f_{t-1}, f_{t+1} -
    f_t)`, 1 at both ends, and `w` the softmax of `kappa / tau` over the T frames. Of the `B = round(T M R)`
    tokens of budget R a frame has `least + w_t (B - T least)`, M at most, rounded to the sum B by largest
    remainders. Inside a frame those with the highest `1 - cos(x, f_t)` plus norm, scaled to [0, 1] in the
    frame, stay. In a stream every call is a video of its own.

    Args:
        tau: temperature of the softmax over frames.
        least: tokens that every frame keeps.
        leftover: what rounding down leaves goes one to a frame ("remainder"), or all to the frame with the
            largest fraction until it is full, as in the code ("published").
    """

    budget: float | int = 0.25
    tau: float = 0.7
    least: int = 1
    leftover: Literal["remainder", "published"] = "remainder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau < 1e-6 or self.least < 0:  # so small a tau divides to infinity
            found = f"{self.tau} and {self.least}"
            raise ValueError(f"tau must be at least 1e-06, least 0 or more, found {found}.")

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens per frame if the video turns equally everywhere; the sum is exact."""
        fed, allowance = [s.fed for s in segments], self.allowance(budget)
        total = max(1, round(allowance.allowed(sum(fed), len(fed))), sum(min(n, self.least) for n in fed))
        return divide(min(sum(fed), total), fed)

    def scores(self, tokens: VisualTokens) -> tuple[Tensor, list[int]]:
        x = self.frames(tokens).float()
        means, norm = F.normalize(x.mean(1).double(), dim=-1, eps=1e-6), x.norm(dim=-1)
        low, high = norm.amin(1, keepdim=True), norm.amax(1, keepdim=True)
        unlike = 1 - torch.cosine_similarity(x, means[:, None].float(), dim=-1, eps=1e-6)
        values = torch.zeros(len(tokens), device=x.device)
        values[tokens.patch_rows] = (unlike + (norm - low) / (high - low + 1e-6)).flatten()
        least = min(self.least, x.shape[1])
        spare = sum(self.counts(tokens.segments)) - len(x) * least
        quotas = ((curvature(means) / self.tau).softmax(0) * spare).tolist()
        more = divide_by(quotas, spare, [x.shape[1] - least] * len(x), fill=self.leftover == "published")
        return tokens.by_cell(values), [least + k for k in more]


def curvature(means: Tensor) -> Tensor:
    """(T,) `1 - cos` of the steps to and from each of the means (T, d), 1 at both ends."""
    steps, kappa = means.diff(dim=0), means.new_ones(len(means))
    kappa[1:-1] -= torch.cosine_similarity(steps[:-1], steps[1:], dim=-1, eps=1e-6)
    return kappa
