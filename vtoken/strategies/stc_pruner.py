"""STC-Pruner: of every frame keep the tokens least like the frame itself and the stream so far."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..tokens import VisualTokens
from .common.grouping import gaussian_similarity, rows_per_segment, unit
from .common.history import history, remember
from .registry import register
from .scored import ScoredStrategy
from .stc_cacher import CODE, LICENCE, PAPER


@register(
    "stc_pruner",
    summary="Keep of every frame the tokens least like the frame's mean and the mean of the stream so far.",
    stages=("projector",),
    paper=PAPER,
    code=CODE,
    code_licence=LICENCE,
    differs="Follows the public code where paper and code disagree (score='dual_anchor' is the paper's "
    "formula, with a blend that it does not state; that of the code of June 2026 is in the same half of the "
    "channels and over the whole history, its blend is 0.5); one frame is scored at a time, the code takes a "
    "call's frames together; the history belongs to one stream and is its running mean, the code's never "
    "ends; scores are float32; newline rows stay where they are (the code puts those of a frame after its "
    "kept tokens); an image is a stream of its segments.",
)
@dataclass
class STCPruner(ScoredStrategy):
    """The pruner of Streaming Token Compression (arXiv 2512.00891), causal and blind to the question.

    "gaussian": of a frame, the half of the channels with the lowest variance over its tokens, in ascending
    order; `y` are its tokens there, normalised, `b` their mean, and `a` the mean of all frames of the stream
    up to this one (the mean over tokens before normalising, each in its own frame's order of channels),
    normalised. With `K(y, c) = sum_w exp(-|y - c|^2 / (2 w))` over five widths the tokens with the lowest
    `K(y, b) + K(y, a)` stay. "dual_anchor": those with the highest `alpha (1 - cos(x, h)) + (1 - alpha) (1 -
    cos(x, s))` stay, where `s` is the mean of the frame's tokens x and `h` the mean of `s` over the frames
    before; the first frame has the second term alone.

    Args:
        score: "gaussian" (the public code) or "dual_anchor" (the paper's formula).
        window: frames that the history spans; None for the whole stream.
        channels: "frame" chooses the channels anew in every frame, "fixed" once per stream.
        alpha: weight of the history in "dual_anchor".
    """

    budget: float | int = 0.25
    score: Literal["gaussian", "dual_anchor"] = "gaussian"
    window: int | None = None
    channels: Literal["frame", "fixed"] = "frame"
    alpha: float = 0.5
    _: KW_ONLY
    keep_newline: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window must be a number of frames, at least 1, or None, found {self.window!r}."
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], found {self.alpha!r}.")

    def scores(self, tokens: VisualTokens) -> Tensor:
        score = self._gaussian if self.score == "gaussian" else self._dual_anchor
        out = torch.zeros(len(tokens), device=tokens.features.device)
        for rows in filter(len, rows_per_segment(tokens)):
            out[rows] = score(tokens.features[rows].float(), tokens.memory)
        return tokens.by_cell(out)

    def _gaussian(self, x: Tensor, memory: dict[str, Any]) -> Tensor:
        """(n,) scores of the tokens of one frame (n, d); the highest stay."""
        channels = memory.get("channels")
        if channels is None:
            channels = x.var(0, correction=0).sort(stable=True).indices[: max(1, x.shape[1] // 2)]
            if self.channels == "fixed":
                memory["channels"] = channels
        u = x[:, channels.to(x.device)]
        remember(memory, u.mean(0), self.window)
        y = unit(u)
        return -gaussian_similarity(y, y.mean(0)) - gaussian_similarity(y, unit(history(memory, x.device)))

    def _dual_anchor(self, x: Tensor, memory: dict[str, Any]) -> Tensor:
        spatial = x.mean(0)
        scores = 1 - unit(x) @ unit(spatial)
        if memory:
            before = unit(history(memory, x.device))
            scores = self.alpha * (1 - unit(x) @ before) + (1 - self.alpha) * scores
        remember(memory, spatial, self.window)
        return scores
