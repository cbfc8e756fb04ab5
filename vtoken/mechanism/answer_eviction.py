"""Evict visual tokens from a KV cache by the attention of the answer, while it is generated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import attention_rows
from ..storage import AnswerEviction
from .attention_rows import heads, rotate
from .cache_alignment import cut_layers
from .cache_crop import physical_length, settle
from .forward_context import Run
from .ragged import right_aligned


def note_visual(run: Run, layers: list[Any]) -> None:
    """Note the visual tokens of a forward in every layer; whatever was asked before is forgotten."""
    assert run.visual is not None and run.index is not None
    now = run.visual.gather(1, run.index) & run.now[0][1]
    for layer in layers:
        before = physical_length(layer) - now.shape[1]
        mine = now.to(layer.keys.device)
        visual = torch.cat([_padded(layer, "visual", before, mine), mine], 1)
        layer.beside["visual"] = visual
        layer.beside["score"] = _padded(layer, "score", visual.shape[1], mine.float())
        total = layer.beside.get("total", torch.zeros_like(mine[:, 0], dtype=torch.long))
        layer.beside["total"] = total + mine.sum(1)
        units = [0] * len(mine) if run.layout is None else run.layout.units
        layer.beside["units"] = layer.beside.get("units", 0) + torch.tensor(units, device=mine.device)
        layer.asked = []


def _padded(layer: Any, name: str, length: int, like: Tensor) -> Tensor:
    """(B, length): what a layer has noted of its first slots, and nothing of the others."""
    noted = layer.beside.get(name)
    noted = like[:, :0] if noted is None else noted
    return F.pad(noted, (0, length - noted.shape[1]))


def ask(run: Run, layers: list[Any]) -> None:
    """Keep what the forward's tokens will ask with."""
    rows = run.ledger.batch_size
    for layer in layers:
        found = run.memo.get(("asked", layer.number))
        if found is None or "visual" not in layer.beside:
            continue
        hidden, cos, sin = (x.expand(rows, *x.shape[1:]) for x in found)
        layer.asked += [
            (hidden[:, i : i + 1], cos[:, i : i + 1], sin[:, i : i + 1]) for i in range(hidden.shape[1])
        ]


def evict(run: Run, layers: list[Any], decoder: Any) -> None:
    """Score the visual tokens and evict a part of them, once enough tokens of the answer are there."""
    storage: AnswerEviction = layers[0].storage
    if len(layers[0].asked) < storage.every:
        return
    visual = layers[0].beside["visual"].sum(1)
    total, units = layers[0].beside["total"], layers[0].beside["units"]
    allowed = (total * storage.share).round().long() if storage.tokens is None else units * storage.tokens
    wanted = allowed.clamp(min=1).minimum(total)
    part = (total - wanted + storage.rounds - 1) // storage.rounds
    left = torch.maximum(wanted, visual - part)
    if bool((left >= visual).all()):  # the budget is reached
        for layer in layers:
            layer.asked = []
        return
    ledger = run.ledger
    # what is hidden goes too, as it would lie elsewhere in every layer
    ledger.follow(physical_length(layers[0]), grow=True, seen=run.seen)
    real, first = ledger.slots[0] >= 0, None
    for layer in layers:
        _score(layer, decoder.layers[layer.number].self_attn, real, storage.newest)
        index, valid = _stay(layer, real, left)
        cut_layers([layer], index)
        for name in ("visual", "score"):
            layer.beside[name] = layer.beside[name].gather(1, index) * valid
        first = (index, valid) if first is None else first
    assert first is not None
    ledger.keep(first[0].to(ledger.device), first[1].to(ledger.device))
    for layer in layers:
        settle(layer, ledger)


def _score(layer: Any, attention: Any, real: Tensor, newest: bool) -> None:
    """Add to a layer's scores the attention of the answer's tokens: mean over heads, sum over tokens."""
    hidden, cos, sin = (torch.cat(x, 1) for x in zip(*layer.asked[-1 if newest else 0 :], strict=True))
    layer.asked = []
    query, keys = rotate(heads(attention, hidden, "q"), cos, sin), layer.keys
    n, asked = keys.shape[2], hidden.shape[1]
    place = torch.arange(n, device=keys.device)
    causal = place[None] <= place[n - asked :, None]
    seen = real.to(keys.device)[:, None] & causal
    received = attention_rows(query, keys, attention.scaling, seen, reduce="sum") / query.shape[1]
    layer.beside["score"] = _padded(layer, "score", n, received) + received
    layer.beside["visual"] = _padded(layer, "visual", n, real[:, :0].to(keys.device))


def _stay(layer: Any, real: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of a layer that stay, (B, m) int64 and valid (B, m): text, and `left` (B,) visual tokens."""
    visual, score = layer.beside["visual"], layer.beside["score"]
    order = score.masked_fill(~visual, -1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    keep = real.to(visual.device) & (~visual | (rank < left.to(visual.device)[:, None]))
    return right_aligned(keep)
