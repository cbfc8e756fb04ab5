"""STC-Cacher: the vision tower computes what moved in a frame and reuses an earlier frame for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..streams import FrameTokens, Reuse
from ..tokens import TowerInfo
from .base import Strategy
from .registry import register

PAPER = (
    "Accelerating Streaming Video Large Language Models via Hierarchical Token Compression, arXiv 2512.00891"
)
CODE = "github.com/lern-to-write/STC"
LICENCE = "none"


@register(
    "stc_cacher",
    summary="In the vision tower, compute the tokens of a frame whose keys moved and reuse an earlier frame "
    "for the rest.",
    stages=("encoder",),
    paper=PAPER,
    code=CODE,
    code_licence=LICENCE,
    differs="Follows the public code where paper and code disagree (all keys are fresh, only values are "
    "mixed); a frame per step; a frame without a reference, or of another size than it, is computed in "
    "full; all frames of a call pass a layer together; the sum of what attention and MLP added is cached, "
    "not both; towers with windows attend within them.",
)
@dataclass
class STCCacher(Strategy):
    """The cacher of Streaming Token Compression (arXiv 2512.00891), for the frames of videos and streams.

    Every `interval`-th frame of a stream is computed in full and becomes the reference. In every layer of the
    frames between, all keys are computed and compared with the reference's; the tokens with the lowest cosine
    are computed, with their attention over all fresh keys and over values that are the reference's but for
    these tokens. Every other token adds to its own hidden state what the reference's token added in this
    layer. The number of visual tokens that the LLM reads stays what it is. Images outside of a
    `vtoken.stream` are computed in full.

    Args:
        budget: share of a frame's tokens that are computed in the tower, or their number; 1.0 is the
            unpatched model.
        interval: frames from one reference to the next; 1 is the unpatched model.
        share_selection: let the first layer choose for all.
        always_cls: compute the CLS token in every frame, among the others.
    """

    budget: float | int = 0.25
    interval: int = 4
    share_selection: bool = False
    always_cls: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval < 1:
            raise ValueError(
                f"interval must be a whole number of frames, at least 1, found {self.interval!r}."
            )

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.interval == 1

    def reuse(self, tower: TowerInfo) -> Reuse | None:
        return Reuse(tuple(range(tower.num_layers)), self.interval, self.choose, self.share_selection)

    def choose(self, tokens: FrameTokens) -> torch.Tensor:
        """(frames, m) int64, the tokens whose keys are least like the reference's."""
        wide = torch.promote_types(tokens.keys.dtype, torch.float32)
        like = torch.cosine_similarity(tokens.keys.to(wide), tokens.reference.to(wide), dim=-1, eps=1e-8)
        if self.always_cls:
            like[:, : tokens.prefix] = -torch.inf
        return like.topk(self.allowance().part(like.shape[1]), largest=False).indices
