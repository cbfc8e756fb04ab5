"""VidCom2: unusual frames keep more tokens, inside a frame the unusual tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..tokens import Segment, VisualTokens
from .common.grouping import gaussian_similarity, unit
from .registry import register
from .scored import ScoredStrategy
from .video import VideoStrategy


@register(
    "vidcom2",
    summary="Divide a video's budget by how unusual each frame is, keep the tokens unlike their frame and "
    "the video.",
    stages=("projector",),
    paper="Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language "
    "Models, arXiv 2505.14454",
    code="github.com/xuyang-liu16/VidCom2",
    code_licence="Apache-2.0",
    differs="Follows the public code where paper and code disagree (similarity='cosine' is the paper's); "
    "scores are float32 and frame shares float64, the code uses the model's dtype; works on batches and on "
    "several videos per prompt; newline rows, one after a video or one after every row of the grid, stay "
    "where they are (the code puts those of a frame after its kept tokens).",
)
@dataclass
class VidCom2(VideoStrategy, ScoredStrategy):
    """Video Compression Commander (arXiv 2505.14454), for videos only.

    On the half of the channels with the smallest variance over the video, each token is normalised to `y`.
    With the mean `g` of the video, the means `g_t` of its frames and `K(a, b) = sum_w exp(-|a - b|^2 / (2
    w))` over five widths `w`, a frame scores `u_t = -mean K(y, g)` and keeps the share `r_t = min(R (1 + s_t
    - 1/T), 1)` of its tokens, where `s` is the softmax of `u / tau` over the T frames and R the budget.
    Inside a frame the `max(1, round(r_t M))` of M tokens with the lowest `K(y, g) + K(y, g_t)` stay.

    Args:
        tau: temperature of the softmax over frames.
        similarity: "gaussian" is the kernel of the public code, "cosine" the paper's text: cosine with the
            means of the raw features, all channels.
        exact: make the number of kept tokens `max(T, floor(T M R))`, whatever the frames' shares round to.
    """

    budget: float | int = 0.25
    tau: float = 0.01
    similarity: Literal["gaussian", "cosine"] = "gaussian"
    exact: bool = False

    static_counts = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0:
            raise ValueError(f"tau must be above 0, found {self.tau}.")

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens per frame if all frames are equally unusual."""
        allowance = self.allowance(budget)
        return [max(1, round(allowance.share_of(s.size) * s.size)) for s in segments]

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int | None:
        if not self.exact or len({s.fed for s in segments}) != 1:
            return None
        kept = self._exactly(len(segments), segments[0].fed)
        return kept + (separators if self.keep_newline else 0)

    def _exactly(self, frames: int, size: int) -> int:
        return max(frames, int(frames * size * self.allowance().share_of(size) + 1e-9))

    def scores(self, tokens: VisualTokens) -> tuple[Tensor, list[int]]:
        x = self.frames(tokens).float()
        video, frame = self._similarities(x)
        score, ratio = video + frame, self.allowance().share_of(x.shape[1])
        counts = self._frame_counts(video, ratio)
        if self.exact:
            counts = _adjust(counts, score, self._exactly(*score.shape))
        values = torch.zeros(len(tokens), device=score.device)
        values[tokens.patch_rows] = -score.flatten()
        return tokens.by_cell(values), counts.tolist()

    def _similarities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity of x (T, M, d) to the video's and to its frame's mean, (T, M) float32 each."""
        if self.similarity == "cosine":
            y = unit(x)
            return (y * unit(x.mean((0, 1)))).sum(-1), (y * unit(x.mean(1, keepdim=True))).sum(-1)
        variance = x.flatten(0, 1).var(0, correction=0)
        channels = variance.sort(stable=True).indices[: max(1, x.shape[-1] // 2)].sort().values
        y = unit(x[..., channels])
        return gaussian_similarity(y, y.mean((0, 1))), gaussian_similarity(y, y.mean(1, keepdim=True))

    def _frame_counts(self, video: Tensor, ratio: float) -> Tensor:
        """(T,) int64: tokens kept of each frame."""
        shares = (-video.double().mean(1) / self.tau).softmax(0)
        ratios = (ratio * (1 + shares - shares.mean())).clamp(max=1)
        # to ten digits, or a half that is exact on paper would round either way
        return (ratios * video.shape[1] * 1e10).round().div(1e10).round().clamp(min=1).long()


def _adjust(counts: Tensor, score: Tensor, target: int) -> Tensor:
    """Drop kept tokens with the highest scores, or add others with the lowest, until `target` are kept.

    Args:
        counts: (T,) int64, tokens kept of each frame. score: (T, M).
    """
    rank = score.argsort(dim=1, stable=True).argsort(dim=1)
    # frames' best first, then the kept ones, then the others, each by score: the first `target` of them stay
    group = torch.where(rank == 0, 0, torch.where(rank < counts.to(rank.device)[:, None], 1, 2)).flatten()
    by_score = score.flatten().sort(stable=True).indices
    order = by_score[group[by_score].argsort(stable=True)]
    return torch.bincount(order[:target] // score.shape[1], minlength=len(score))
