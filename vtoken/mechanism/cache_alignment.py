"""Cut the KV cache of earlier layers to the tokens that survived the last drop, after the prompt was read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import kv_compact
from .drop_schedule import DropSchedule
from .forward_context import Run
from .masks import WINDOW_FULL


def align_cache(run: Run, schedule: DropSchedule) -> None:
    """Cut the cache of the aligned layers to the last drop, before the ledger notes the forward.

    Earlier forwards were aligned when they were read, so only the current tokens move. The logical length
    stays.
    """
    final = len(run.now) - 1
    past = run.ledger.slots[final].shape[1]
    for stage in sorted({schedule.reads(i) for i in schedule.aligned} - {final}):
        if run.now[stage][0] is run.now[final][0]:
            continue
        index = _columns(run, stage, final, past)
        group = [run.cache.layers[i] for i in schedule.aligned if schedule.reads(i) == stage]
        if any(layer.keys.shape[2] < past + run.now[stage][0].shape[1] for layer in group):
            raise NotImplementedError(WINDOW_FULL)
        for device, heads in {(layer.keys.device, layer.keys.shape[1]) for layer in group}:
            here = [x for x in group if (x.keys.device, x.keys.shape[1]) == (device, heads)]
            cut_layers(here, index.to(device), inplace=run.static and not run.ragged[final])


def _columns(run: Run, stage: int, final: int, past: int) -> Tensor:
    """(B, m) int64: for every slot of the last stage, its token's slot in `stage`; filler points at 0."""
    (index, valid), (last, valid_last) = run.now[stage], run.now[final]
    assert run.index is not None
    column = torch.zeros_like(run.index)
    row, place = valid.nonzero(as_tuple=True)
    column[row, index[row, place]] = place
    now = torch.where(valid_last, past + column.gather(1, last), 0)
    return torch.cat([torch.arange(past, device=now.device).expand(len(now), past), now], 1)


def cut_layers(layers: list[Any], index: Tensor, inplace: bool = False) -> None:
    """Keep the slots `index` (B, m) int64 of layers on one device, strictly ascending if `inplace`."""
    keys, values = kv_compact([x.keys for x in layers], [x.values for x in layers], index, inplace)
    for layer, key, value in zip(layers, keys, values, strict=True):
        if layer.is_compileable:  # static buffers keep their address
            if not inplace:  # filler points back at slot 0
                layer.keys[:, :, : key.shape[2]].copy_(key)
                layer.values[:, :, : value.shape[2]].copy_(value)
            layer.cumulative_length.fill_(key.shape[2])
        else:
            layer.keys, layer.values = key, value
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = key.shape[2]
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int = key.shape[2]
