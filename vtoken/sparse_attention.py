"""Attention of each LLM layer to tokens of its own choice, declared by strategies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .selection import Selection


@dataclass(frozen=True)
class SparseAttention:
    """Attention among the chosen tokens of a prompt alone; the others pass a layer without it.

    Attributes:
        evicts: whether a layer's KV cache holds the keys and values of its chosen tokens only, or of all.
        interval: tokens after the prompt from one choice among them to the next, 0 for none; needs `evicts`
            or a `MixedPrecision` as the storage.
        retain: `retain((heads, m) float32) -> Selection` of the latest m tokens after the prompt by what the
            last of them, which stays in any case, pays to them; the others leave a layer's cache, or have
            fewer bits there.
    """

    evicts: bool
    interval: int = 0
    retain: Callable[[Tensor], Selection] | None = field(default=None, compare=False)


@dataclass
class AttentionTokens:
    """The tokens of one prompt as the attention of LLM layer `layer` receives them, padding removed.

    Attributes:
        layer: the layer.
        visual: (n,) bool. The last of the n tokens is the one from which the answer is read.
        positions: (n,) int64, index of each token within the prompt's forward, padding included.
        attention_rows: `attention_rows(rows)` with (r,) int64 indices into the n tokens -> (heads, r, n)
            float32, softmaxed rows of the layer's attention to all tokens; of tokens that an earlier forward
            stored the rows lack their part.
        units: images and video frames of this prompt, for budgets in tokens per image or frame.
    """

    layer: int
    visual: Tensor
    positions: Tensor
    attention_rows: Callable[[Tensor], Tensor]
    units: int = 1

    def __len__(self) -> int:
        return self.visual.shape[0]
