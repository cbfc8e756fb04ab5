"""Visual tokens leave the KV cache while the answer is generated, those that it looks at least first."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from ..storage import AnswerEviction
from .base import Strategy
from .registry import register


@register(
    "decode_evict",
    summary="Shrink the visual part of every layer's KV cache while the answer is generated, by the "
    "attention that the answer's tokens pay to it.",
    stages=("cache",),
    budget_means="cache",
    paper="LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference, arXiv "
    "2406.18139; H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv "
    "2306.14048",
    code="github.com/FMInference/H2O",
    code_licence="no licence stated",
    differs="Takes from H2O the accumulated attention as the score, and from LOOK-M that text stays and "
    "visual tokens go; the schedule is ours. H2O evicts a token per step and head from the first step on, by "
    "the attention of prompt and answer; here all heads of a layer lose the same tokens, in `rounds` "
    "evictions, by the attention of the answer alone. LOOK-M evicts once, after the prompt, by the attention "
    "of the prompt's text, and merges what it evicts; here nothing is merged.",
)
@dataclass
class DecodeEvict(Strategy):
    """Eviction of visual tokens by the attention of the answer's own tokens.

    The prompt is read whole. After every `decode_every` tokens of the answer each layer adds to the score of
    its visual tokens the attention that these tokens pay to them, softmaxed over all that they see: the mean
    over heads, summed over tokens. The lowest scores leave the layer's cache, each time a part of what has to
    go, until the budget is left after `rounds` evictions. Text stays, and so do positions. Short answers lose
    nothing. The rows are computed again from q_proj and the cached keys; there is no n x n map.

    Args:
        budget: share of the visual tokens that stay in the KV cache, or a number of them per image or frame,
            of each row together.
        decode_every: tokens of the answer from one eviction to the next, at least 1.
        rounds: evictions until the budget is reached, at least 1.
        queries: "all" tokens since the last eviction ask, or the "newest" alone.
    """

    budget: float | int = 0.5
    _: KW_ONLY
    decode_every: int = 16
    rounds: int = 4
    queries: Literal["all", "newest"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decode_every", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)!r}.")

    def storage(self, num_layers: int) -> AnswerEviction:
        budget, newest = self.allowance(), self.queries == "newest"
        share, tokens = (budget.value, None) if budget.is_share else (None, int(budget.value))
        return AnswerEviction(share, tokens, self.decode_every, self.rounds, newest)
