"""ZipVL: every layer of the LLM attends to its own important tokens, and caches these alone."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from ..selection import Selection
from ..sparse_attention import AttentionTokens, SparseAttention
from ..storage import MixedPrecision
from .base import Strategy, top_k
from .budgets import Budget
from .registry import register


@register(
    "zipvl",
    summary="In each layer of the LLM attend only to the tokens that together receive most of the attention, "
    "and keep only these in the KV cache.",
    stages=("prefill", "cache"),
    budget_means="attention",
    paper="ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification, arXiv 2410.08584",
    code="none is public",
    differs="Ours, as there is no code: the probes' attention is averaged over heads, every layer draws the "
    "same probes, and the last token always passes. Text tokens are candidates, as in the equations. A "
    "prompt without pictures attends to all its tokens; one on the KV cache of earlier turns chooses among "
    "its own tokens, by the attention to these. So does an answer: `tau` is the share of the newest token's "
    "attention to the latest.",
)
@dataclass
class ZipVL(Strategy):
    """ZipVL (arXiv 2410.08584): tokens that are not important leave the KV cache, or have fewer bits there.

    While an LLM layer reads a prompt, probes look at all its tokens: the last `recent` tokens and `probes`
    random ones before them. With `a` what a token receives from them, averaged over heads, the layer has as
    many important tokens as the fewest that receive a share `tau` of all attention; those are important
    whose `a`, divided by the number of probes that see them, is largest, as more probes see early tokens.
    Attention runs among the important tokens alone, at their original positions. The others get nothing from
    it and go on to the MLP and the next layer, which chooses anew. A prompt without pictures is read as
    without a patch; so is a later turn without pictures, of which nothing leaves the KV cache.

    Args:
        budget: None for `tau`; or a fixed number of important tokens in every layer, the paper's "fixed": of
            all tokens, text included.
        tau: share of the attention that the important tokens receive; the paper has 0.975, or 0.96 to save
            more. 1.0 is the unpatched model, but for kv="quant", which has all tokens in 4 bits.
        recent: latest tokens that are probes.
        probes: random tokens before these that are probes too.
        kv: "evict" stores keys and values of a layer's important tokens alone (the paper's second version);
            "quant" those of all tokens, important ones in 4 bits and others in 2 (its first version), by
            ZipCache's quantiser: keys have a scale and a zero per channel, values are divided by the root of
            their channel's largest magnitude and have them per token; "full" those of all tokens as they
            are, an extension.
        seed: of the random probes.
        interval: generated tokens from one choice among them, by the attention of the newest, to the next:
            those that are not important leave the KV cache, or have 2 bits, too. 0 keeps them all as they
            are, as do a static cache, decoding with drafts and kv="full"; a whole-number budget evicts none.
    """

    budget: float | int | None = None  # type: ignore[assignment]
    tau: float = 0.975
    _: KW_ONLY
    recent: int = 64
    probes: int = 64
    kv: Literal["evict", "quant", "full"] = "evict"
    seed: int = 0
    interval: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must lie in (0, 1], found {self.tau!r}.")
        if self.recent < 1:
            raise ValueError(f"recent must be a number of tokens, at least 1, found {self.recent!r}.")
        if self.probes < 0:
            raise ValueError(f"probes must be a number of tokens, at least 0, found {self.probes!r}.")
        if self.interval < 0:
            raise ValueError(f"interval must be a number of tokens, at least 0, found {self.interval!r}.")

    @property
    def is_identity(self) -> bool:
        return self.kv != "quant" and (self.tau == 1 if self.budget is None else super().is_identity)

    def attention(self) -> SparseAttention:
        return SparseAttention(self.kv == "evict", 0 if self.kv == "full" else self.interval, self.retain)

    def storage(self, num_layers: int) -> MixedPrecision | None:
        return MixedPrecision(high=4, low=2) if self.kv == "quant" else None

    @property
    def acts_on_cache(self) -> bool:
        return self.kv == "quant"

    def attend(self, tokens: AttentionTokens) -> Selection:
        n, device = len(tokens), tokens.visual.device
        fixed = None if self.budget is None else round(Budget(self.budget).allowed(n, tokens.units))
        if fixed is not None and fixed >= n:
            return Selection.everything(n, device)
        seen = tokens.attention_rows(self._probes(n).to(device)).mean(0)  # (r, n)
        received = seen.sum(0)
        count = important(received, self.tau) if fixed is None else max(1, fixed)
        score = received / (seen > 0).sum(0).clamp(min=1)
        score[-1] = torch.inf
        return Selection(top_k(score, count))

    def retain(self, attention: Tensor) -> Selection:
        """Important tokens among the latest of an answer, by (heads, m) of the newest token, the last."""
        received, m = attention.mean(0), attention.shape[1]
        if isinstance(self.budget, int):
            return Selection.everything(m, attention.device)
        count = important(received, self.tau) if self.budget is None else max(1, round(self.budget * m))
        return Selection(top_k(received.index_fill(0, received.new_tensor([m - 1]).long(), torch.inf), count))

    def _probes(self, n: int) -> Tensor:
        """(r,) int64 ascending: the tokens that look, of n."""
        before = n - self.recent
        if before <= self.probes:
            return torch.arange(n)
        drawn = torch.randperm(before, generator=torch.Generator().manual_seed(self.seed))[: self.probes]
        return torch.cat([drawn.sort().values, torch.arange(before, n)])


def important(received: Tensor, tau: float) -> int:
    """The fewest tokens of (n,) whose largest values sum to `tau` of all, at least 1."""
    mass = received.double().sort(descending=True).values.cumsum(0)
    return min(len(mass), int((mass < tau * mass[-1]).sum()) + 1)
