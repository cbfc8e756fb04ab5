"""Forms in which the layers of an LLM's KV cache hold tokens, declared by strategies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Storage:
    """Base of the declarations: how each layer of the KV cache holds the tokens that it is given.

    `vtoken.mechanism.stored_cache` has a class of cache layers for each declaration.
    """


@dataclass
class PromptTokens:
    """The tokens of a forward with visual tokens as they enter the LLM, told to its cache layers before.

    Attributes:
        visual: (B, n) bool.
        real: (B, n) bool, those that are no filler.
        embeddings: (B, n, D).
    """

    visual: Tensor
    real: Tensor
    embeddings: Tensor
