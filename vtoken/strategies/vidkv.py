"""VidKV: keys and values of 1 to 2 bits in the KV cache of the LLM."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..storage import Packed, PromptTokens
from .base import Strategy
from .registry import register


@register(
    "vidkv",
    summary="Store the KV cache in 1 to 2 bits a number: the answer reads it, the prompt does not.",
    stages=("cache",),
    paper="Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models, arXiv 2503.16257",
    code="github.com/KD-TAO/VidKV",
    code_licence="no licence stated",
    differs="Three levels have a scale and a bit has a sign, which the code leaves out (`scale`, `sign`); "
    "`gamma` is the paper's 0.7, not the code's 0.5. A token is quantised once, where the code reads and "
    "quantises the whole cache again after every `residual` tokens, so hard channels are those of the first "
    "block. Channels are ranked in each row of a batch. The protected tokens are found in any prompt and all "
    "of them are protected, where the code leaves out 32. Easy channels always go through the Fourier "
    "transform, as in the code; half of the conjugate pairs is stored. Three levels take 1.6 bits, not 2.",
)
@dataclass
class VidKV(Strategy):
    """Packed storage of the LLM's KV cache; every token is read in full precision by its own forward.

    Keys: in groups of `group` tokens a channel has a smallest number and a scale. The channels of the largest
    range, a share `key_bits - 1`, have 2 bits. The others go through a Fourier transform along the channels,
    whose coefficients have 1 bit: plus or minus the group's mean magnitude. Values have three levels: 0 up to
    `gamma` times the group's mean magnitude, and plus or minus the mean of the rest; five take a byte, 1.6
    bits each. A share `protect` of the visual tokens, those whose embedding has the largest mean product
    with the text's, have values of 2 bits. Scales and zeros have the cache's own type: with groups of 32 in
    float16 they add half a bit to 1 and 1.58 bits, and one bit to 2. The defaults take 7 times fewer bytes
    than float16; 10 times take `group=512, residual=512, protect=0`. Whole groups are packed when a prompt
    with visual tokens has been read, and whenever `residual` tokens wait. The LLM reads as many visual
    tokens as before: there is no budget.

    Args:
        key_bits: 4, 2, or in [1, 2) the mean of channels with 2 bits and with 1.
        value_bits: 4, 2, or 1.58.
        protect: share of the visual tokens with values of 2 bits, where others have 1.58.
        gamma: threshold of the three levels.
        group: tokens of a scale.
        residual: tokens in full precision while an answer grows, a multiple of `group`.
        value_groups: "channel", or "token" for scales over `group` channels of a token (KIVI).
        scale: False reads the three levels as -1, 0 and 1.
        sign: False reads negative numbers of one bit as 0.
    """

    budget: float | int | None = field(default=None, init=False)  # type: ignore[assignment]
    key_bits: float = 1.5
    value_bits: float = 1.58
    _: KW_ONLY
    protect: float = 0.2
    gamma: float = 0.7
    group: int = 32
    residual: int = 128
    value_groups: Literal["channel", "token"] = "channel"
    scale: bool = True
    sign: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (1 <= self.key_bits <= 2 or self.key_bits == 4):
            raise ValueError(f"key_bits must lie in [1, 2] or be 4, found {self.key_bits!r}.")
        if self.value_bits not in (1.58, 2, 4):
            raise ValueError(f"value_bits must be 1.58, 2 or 4, found {self.value_bits!r}.")
        if not 0 <= self.protect <= 1:
            raise ValueError(f"protect must be a share in [0, 1], found {self.protect!r}.")
        if not 0 <= self.gamma < 2:
            raise ValueError(f"gamma must lie in [0, 2), found {self.gamma!r}.")
        if self.group < 1 or self.residual < 1 or self.residual % self.group:
            raise ValueError(
                f"residual must be a multiple of group, found residual={self.residual!r} and"
                f" group={self.group!r}."
            )

    def storage(self, num_layers: int) -> Packed:
        words = self.value_groups, self.gamma, self.scale, self.sign, self.protect, relevance
        return Packed(self.key_bits, self.value_bits, self.group, self.residual, *words)


def relevance(tokens: PromptTokens) -> Tensor:
    """(B, n): mean over a row's text of the product of embeddings; 0 without text."""
    x = tokens.embeddings.to(torch.promote_types(tokens.embeddings.dtype, torch.float32))
    text = (tokens.real & ~tokens.visual).to(x.dtype)[..., None]
    mean = (x * text).sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
    return (x * mean).sum(-1)
