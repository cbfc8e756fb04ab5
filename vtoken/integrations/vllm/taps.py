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
        towers: by modality that of the transformers model, for the number of heads and the rules.
        attentions: per layer, vLLM's module that is called with queries and keys after rotary embedding:
            (images, tokens, heads * head_dim), or (1, tokens, heads, head_dim) with `cu_seqlens`.
        layers: those that are read.
    """

    def __init__(self, towers: dict[str, Tower], attentions: Sequence[nn.Module], layers: set[int]) -> None:
        self.towers = towers
        self.capture: Capture | None = None
        for layer in sorted(layers):
            read = functools.partial(self._read, layer)
            attentions[layer].register_forward_pre_hook(read, with_kwargs=True)

    def start(self, modality: str, needs: Needs, arguments: tuple[Any, ...]) -> Capture:
        """Begin to read a forward of the tower.

        Args:
            arguments: those of the transformers tower, for towers over one packed sequence.
        """
        self.capture = capture = Capture(modality, needs)
        tower = self.towers[modality]
        if isinstance(tower, PackedTower):
            capture.pending["packing"] = tower.packing(arguments, {})
        return capture

    def stop(self) -> None:
        self.capture = None

    def _read(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        capture = self.capture
        if capture is None or layer not in capture.needs.tower_layers:
            return
        tower = self.towers[capture.modality]
        given = (kwargs[name] if name in kwargs else args[i] for i, name in enumerate(("query", "key")))
        query, key = (_heads(x, tower) for x in given)
        with torch.no_grad():
            if isinstance(tower, PackedTower):
                query, key = query[0].transpose(0, 1), key[0].transpose(0, 1)
                packing = capture.pending["packing"]
                tower.record_packed(capture, layer, query, key, kwargs["cu_seqlens"], packing)
            else:
                tower.record(capture, layer, query, key)


def _heads(x: Tensor, tower: Tower) -> Tensor:
    """(images, heads, tokens, head_dim) with the heads of all ranks."""
    if x.ndim == 3:
        x = x.unflatten(-1, (-1, int(tower.attention(0).head_dim)))  # type: ignore[arg-type]
    x = x.transpose(1, 2)
    if x.shape[1] < tower.info.num_heads and get_tensor_model_parallel_world_size() > 1:
        x = tensor_model_parallel_all_gather(x.contiguous(), dim=1)
    return x
