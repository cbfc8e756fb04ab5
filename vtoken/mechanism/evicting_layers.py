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
        """Bytes of all tensors that the layer holds."""
        asked = (x for token in self.asked for x in token)
        tensors: list[Any] = [self.keys, self.values, *self.beside.values(), *asked]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, and what was noted of them.

        Raises:
            NotImplementedError: if an eviction counts images, and some go.
        """
        gone = abs(tokens_to_remove)
        left = max(0, self.keys.shape[2] - gone) if self.is_initialized else 0
        visual = self.beside.get("visual")
        if gone and visual is not None and visual.shape[1] > left:
            pictures = visual[:, left:].sum(1)
            if bool(pictures.any()) and getattr(self.storage, "tokens", None) is not None:
                raise NotImplementedError(
                    "A KV cache whose budget counts tokens per image cannot be cropped into an image: keep a"
                    " copy of the cache as it was, or start with a new cache."
                )
            self.beside["total"] = self.beside["total"] - pictures
            self.beside |= {name: self.beside[name][:, :left] for name in ("visual", "score")}
        self.asked = self.asked[: max(0, len(self.asked) - gone)] if gone else self.asked
        super().crop(tokens_to_remove)

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
