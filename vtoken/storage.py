"""Forms in which the layers of an LLM's KV cache hold tokens, declared by strategies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Storage:
    """Base of the declarations: how each layer of the KV cache holds the tokens that it is given.

    `vtoken.mechanism.stored_cache` has a class of cache layers for each declaration.
    """


@dataclass(frozen=True)
class Packed(Storage):
    """Keys and values as codes of less than a byte, in groups of tokens; the latest tokens as they are.

    Attributes:
        key_bits: 2 or 4; in [1, 2) the mean of channels with 2 bits, a share `key_bits - 1`, and with 1.
        value_bits: 1.58 (three levels), 2 or 4.
        group: tokens that share a scale, a channel each.
        residual: tokens that are kept as they are while an answer grows; a multiple of `group`.
        value_groups: "channel", or "token": `group` channels of a token share a scale.
        gamma: values up to `gamma` times their group's mean magnitude become 0 of the three levels.
        scale: whether the three levels have a scale; otherwise they are -1, 0 and 1.
        sign: whether negative numbers of 1 bit are read as minus the scale; otherwise as 0.
        protect: share of the visual tokens whose values have 2 bits where the others have three levels.
        relevance: (B, n) scores of a prompt's tokens; the visual tokens with the largest are protected.
    """

    key_bits: float
    value_bits: float
    group: int = 32
    residual: int = 128
    value_groups: Literal["channel", "token"] = "channel"
    gamma: float = 0.7
    scale: bool = True
    sign: bool = True
    protect: float = 0.0
    relevance: Callable[[PromptTokens], Tensor] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class MixedPrecision(Storage):
    """Tokens that a layer attends to as codes of `high` bits, its other tokens of `low`: 2 or 4.

    Goes with a `SparseAttention` that evicts nothing: once a layer has read a prompt, and after every
    `interval` tokens of the answer, the tokens that it stored since are packed.
    """

    high: int
    low: int


@dataclass(frozen=True)
class SinkWindow(Storage):
    """Each layer holds the first `sinks` tokens of a row and its last `recent` ones, in cache order."""

    sinks: int
    recent: int


@dataclass(frozen=True)
class AnswerEviction(Storage):
    """Each layer loses visual tokens while the answer is generated, those that the answer looks at least.

    Attributes:
        share: of the visual tokens, those that stay; None if `tokens` tells.
        tokens: that stay per image or frame; None if `share` tells.
        every: tokens of the answer from one eviction to the next.
        rounds: evictions until no more has to go.
        newest: whether the newest token alone is asked, else all since the last eviction.
    """

    share: float | None
    tokens: int | None
    every: int
    rounds: int
    newest: bool


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

    def take(self, index: Tensor, valid: Tensor) -> PromptTokens:
        """The tokens `index` (B, m) that are left after a drop; filler where not `valid`."""
        rows = index[..., None].expand(*index.shape, self.embeddings.shape[-1])
        visual, embeddings = self.visual.gather(1, index) & valid, self.embeddings.gather(1, rows)
        return PromptTokens(visual, valid, embeddings)
