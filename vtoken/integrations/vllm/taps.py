"""Attention of vLLM's vision towers, read from the queries and keys that enter their attention kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

from ...adapters.towers.base import Tower
from ...adapters.towers.capture import Capture
from ...adapters.towers.packed import PackedTower
from ...tokens import Needs


class TowerTap:
    """Hooks on the attention kernels of a tower; what is read is computed as on the transformers model.

    With tensor parallelism a rank has some of the heads; those of all ranks are gathered, in the layers that
    are read.

    Args:
        tower: that of the transformers model, for the number of heads and the rules.
        attentions: per layer, vLLM's module that is called with queries and keys after rotary embedding:
            (images, tokens, heads * head_dim), or (1, tokens, heads, head_dim) with `cu_seqlens`.
        layers: those that are read.
    """

    def __init__(self, tower: Tower, attentions: Sequence[nn.Module], layers: set[int]) -> None:
        self.tower, self.capture = tower, None
        for layer in sorted(layers):
            read = functools.partial(self._read, layer)
            attentions[layer].register_forward_pre_hook(read, with_kwargs=True)

    def start(self, modality: str, needs: Needs, arguments: tuple[Any, ...]) -> Capture:
        """Begin to read a forward of the tower; `arguments` are those of the transformers tower, for packing."""
        self.capture = capture = Capture(modality, needs)
        if isinstance(self.tower, PackedTower):
            capture.pending["packing"] = self.tower.packing(arguments, {})
        return capture

    def stop(self) -> None:
        self.capture = None

    def _read(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        capture = self.capture
        if capture is None or layer not in capture.needs.tower_layers:
            return
        query, key = (self._heads(kwargs[n] if n in kwargs else args[i], i) for i, n in enumerate(("query", "key")))
        with torch.no_grad():
            if isinstance(self.tower, PackedTower):
                self.tower.record_packed(
                    capture, layer, query[0].transpose(0, 1), key[0].transpose(0, 1), kwargs["cu_seqlens"],
                    capture.pending["packing"],
                )
            else:
                self.tower.record(capture, layer, query, key)

    def _heads(self, x: Tensor, index: int) -> Tensor:
        """(images, heads, tokens, head_dim) with the heads of all ranks."""
        heads, ranks = self.tower.info.num_heads, get_tensor_model_parallel_world_size()
        if x.ndim == 3:
            head_dim = self._head_dim()
            x = x.unflatten(-1, (-1, head_dim))
        x = x.transpose(1, 2)
        if x.shape[1] < heads and ranks > 1:
            x = tensor_model_parallel_all_gather(x.contiguous(), dim=1)
        return x

    def _head_dim(self) -> int:
        return int(self.tower.attention(0).head_dim)  # type: ignore[arg-type]
