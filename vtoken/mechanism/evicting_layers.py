"""Layers of a KV cache that lose tokens after a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..storage import PromptTokens, Storage


class EvictingLayer(DynamicLayer):
    """A layer whose slots `vtoken.mechanism.eviction` cuts after forwards, in all layers to one number.

    Attributes:
        storage: the declaration.
        beside: further tensors by name, with the batch rows first.
        asked: per token of the answer that has not been asked yet, its input (B, 1, D) of the attention, and
            its cosines and sines.
    """

    storage: Storage | None = None

    def begin(self, storage: Storage, number: int) -> None:
        self.storage = storage
        self.beside: dict[str, Tensor] = {}
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def announce(self, tokens: PromptTokens) -> None:
        """The forward itself tells all that an eviction reads."""

    def settle(self, tokens: PromptTokens) -> None:
        """Likewise."""

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, and of what is held beside them."""
        tensors: list[Any] = [self.keys, self.values, *self.beside.values()]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def reset(self) -> None:
        self.beside, self.asked = {}, []
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._move(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._move(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Any) -> None:
        super().batch_select_indices(indices)
        self._move(lambda x: x[indices])

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        self.beside = {name: move(x) for name, x in self.beside.items()}
        self.asked = [(move(h), move(cos), move(sin)) for h, cos, sin in self.asked]
