"""Cache of a vision tower's patch embedding and layers: computed once per batch for all cells of a board."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class TowerMemo:
    """Remembers what a tower's patch embedding and layers give for a batch, and returns it for equal inputs.

    Only the computation of a layer is saved, and only if no hook reads values inside it: a layer with hooks
    on its parts (a strategy reads its attention) runs, and so does one whose input is not, bit for bit, the
    remembered one (a strategy has merged tokens before it). The model's answers are the same with and
    without the cache.
    """

    def __init__(self, model: Any) -> None:
        decoder = set(model.get_decoder().modules())
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and m not in decoder]
        patches = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d) and m not in decoder]
        self.layers = [*patches, *(layer for some in lists for layer in some)]
        self.known: dict[tuple[int, int], tuple[Tensor, Any, list[int]]] = {}
        self.spared = 0

    @contextmanager
    def reading(self, batch: int) -> Iterator[None]:
        """Within the block the tower reads batch number `batch`."""
        free = [(i, layer) for i, layer in enumerate(self.layers) if "forward" not in layer.__dict__]
        try:
            for i, layer in free:
                layer.forward = self._remembering(layer, (batch, i))
            yield
        finally:
            for _, layer in free:
                del layer.forward

    def _remembering(self, layer: nn.Module, key: tuple[int, int]) -> Any:
        forward = layer.forward

        def wrapped(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if _overheard(layer):
                return forward(hidden_states, *args, **kwargs)
            if key in self.known:
                given, answer, versions = self.known[key]
                if versions == _versions(given, answer) and _equal(given, hidden_states):
                    self.spared += 1
                    return answer
            answer = forward(hidden_states, *args, **kwargs)
            if key not in self.known:
                self.known[key] = hidden_states, answer, _versions(hidden_states, answer)
            return answer

        return wrapped


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; views of the same memory are not read."""
    place = [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in (a, b)]
    return place[0] == place[1] or torch.equal(a, b)


def _overheard(layer: nn.Module) -> bool:
    """Whether parts of this layer have hooks other than those of transformers that collect `attentions`."""
    hooks = (
        h
        for m in layer.modules()
        if m is not layer
        for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    )
    return any(getattr(h, "__module__", None) != "transformers.utils.output_capturing" for h in hooks)


def _versions(given: Tensor, answer: Any) -> list[int]:
    """Version counters of tensors: they change whenever a tensor is written in place."""
    return [
        t._version for t in (given, *(answer if isinstance(answer, tuple) else (answer,))) if t is not None
    ]
