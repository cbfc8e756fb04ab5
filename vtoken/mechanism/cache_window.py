"""Slide the window of a KV cache: the first tokens of a row and its last ones stay.

A query sees the distance to a key alone. The keys of the window keep their rotation; those of the first
tokens are rotated forward, always from their first value, so far that they stand right before the window.
Once in `FAR` tokens the window is rotated back to right after the first tokens, and positions go on there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..storage import SinkWindow
from .attention_rows import rotary_tables, rotate, turns_halves
from .cache_alignment import cut_layers
from .cache_crop import settle
from .forward_context import Run
from .ledger import Ledger
from .ragged import right_aligned

TIED_TO_LENGTH = ("dynamic", "longrope")  # rotary tables that change with the sequence
NORMS = ("q_norm", "k_norm", "v_norm")
FAR = 4096  # tokens lost, at least, until positions are counted anew


def check_rotation(decoder: Any, name: str, kind: str) -> None:
    """Raise ValueError unless keys of this decoder can be moved to another position."""
    lacks, rotary = None, getattr(decoder, "rotary_emb", None)
    attentions = [getattr(layer, "self_attn", None) for layer in getattr(decoder, "layers", ())]
    scaling = getattr(decoder.config, "rope_parameters", None) or {}
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=decoder.config).layers):
        lacks = "full attention in every layer"
    elif rotary is None or not attentions or None in attentions:
        lacks = "rotary embeddings"
    elif scaling.get("rope_type") in TIED_TO_LENGTH:
        lacks = "rotary tables that do not change with the length"
    elif not all(turns_halves(type(a)) and getattr(a, "use_rope", True) for a in attentions):
        lacks = "rotary embeddings that turn the two halves of a head in every layer"
    elif any("norm" in n and n not in NORMS for a in attentions for n, _ in a.named_children()):
        lacks = "norms before the rotary embedding alone"
    elif not _moves(decoder):
        lacks = "rotary tables that depend on the position alone"
    if lacks is not None:
        raise ValueError(
            f"{name} moves keys in the KV cache, for which it needs {lacks}; the LLM of this {kind} model has"
            " others: use a projector strategy."
        )


@torch.no_grad()
def _moves(decoder: Any) -> bool:
    """Whether the tables of a position are those of another one, rotated by the distance; True on meta."""
    weight = next(decoder.parameters())
    if weight.is_meta:
        return True
    like = torch.zeros(1, 1, 1, device=weight.device)
    at = [torch.tensor([[p]], device=weight.device) for p in (3, 40)]
    try:
        first, later = (rotary_tables(decoder, like, p) for p in at)
        ahead = _turn(decoder, like, at[1] - at[0])
    except Exception:  # of a module that takes other things
        return False
    moved = first[0] * ahead[0] - first[1] * ahead[1], first[1] * ahead[0] + first[0] * ahead[1]
    same = zip(moved, later, strict=True)
    return all(a.shape == b.shape and bool((a - b).abs().max() < 1e-3) for a, b in same)


def _turn(decoder: Any, like: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, rotary_dim) of a rotation by `distance` (B, 1), without a scale of tables."""
    cos, sin = rotary_tables(decoder, like, distance)
    length = (cos.square() + sin.square()).sqrt()
    return cos / length, sin / length


def fill_positions(run: Run, stored: int, axes: int) -> None:
    """Enter a forward's tokens into the ledger, and the position ids of all `stored` slots."""
    ledger, positions = run.ledger, run.positions
    assert positions is not None
    # within an answer a mask hides nothing more
    ledger.follow(stored, grow=True, seen=run.seen if run.query_length > 1 else None)
    positions = positions[None] if positions.ndim == 2 else positions
    positions = positions[-axes:].to(ledger.device)
    positions = positions.expand(axes, ledger.batch_size, positions.shape[-1])
    known = ledger.places
    unknown = stored - positions.shape[2] - (0 if known is None else known.shape[2])
    if unknown > 0:  # text, or one axis: positions count tokens
        ahead = torch.arange(-unknown, 0, device=ledger.device) + positions[..., :1]
        positions = torch.cat([ahead, positions], 2)
    ledger.places = positions if known is None else torch.cat([known, positions], 2)


def slide(ledger: Ledger, layers: list[Any], decoder: Any) -> None:
    """Cut the layers to the first and the last tokens of every row, and move the first ones."""
    storage: SinkWindow = layers[0].storage
    sinks, most, stored = storage.sinks, storage.sinks + storage.recent, ledger.slots[0].shape[1]
    if stored <= most:
        return
    before = ledger.lost
    if ledger.ragged[0]:
        real = ledger.slots[0] >= 0
        rank, count = real.cumsum(1) - 1, real.sum(1, keepdim=True)
        index, valid = right_aligned(real & ((rank < sinks) | (rank >= count - storage.recent)))
        lost = (count > most)[:, 0]
    else:
        places = torch.arange(stored, device=ledger.device)
        index = torch.cat([places[:sinks], places[stored - storage.recent :]]).expand(ledger.batch_size, -1)
        valid, lost = None, torch.ones(ledger.batch_size, dtype=torch.bool, device=ledger.device)
    ledger.lost = lost if before is None else before | lost
    ledger.keep(index, valid)
    for device, heads in {(layer.keys.device, layer.keys.shape[1]) for layer in layers}:
        cut_layers(
            [x for x in layers if (x.keys.device, x.keys.shape[1]) == (device, heads)], index.to(device)
        )
    ledger.slid += stored - index.shape[1]
    _move(ledger, layers, decoder, before)
    for layer in layers:
        settle(layer, ledger)


def _move(ledger: Ledger, layers: list[Any], decoder: Any, before: Tensor | None) -> None:
    """Let the first keys stand right before the window; `before` (B,): rows that had lost tokens earlier."""
    assert ledger.places is not None and ledger.lost is not None
    storage: SinkWindow = layers[0].storage
    sinks, first = storage.sinks, ledger.places[:, :, storage.sinks :].amin((0, 2))
    after = ledger.places[:, :, :sinks].amax((0, 2)) + 1 if sinks else torch.zeros_like(first)
    distance = torch.where(ledger.lost, (first - after).clamp(min=0), 0)
    if ledger.slid >= max(FAR, storage.recent):
        distance = distance - _count_anew(ledger, layers, decoder, int(distance.min()))
    if not sinks:
        return
    for layer in layers:
        now, first_value = layer.keys[:, :, :sinks], layer.beside.get("sinks")
        if first_value is None or before is None:
            first_value = now.clone()
        else:
            first_value = torch.where(before.to(now.device)[:, None, None, None], first_value, now)
        layer.beside["sinks"] = first_value
    _rotate(layers, decoder, slice(0, sinks), distance, "sinks")


def _count_anew(ledger: Ledger, layers: list[Any], decoder: Any, tokens: int) -> int:
    """Let positions from the window on begin by so many earlier; a key lives too shortly to drift by it.

    Tables of far positions are inexact: they are angles in float32.
    """
    assert ledger.places is not None
    sinks = layers[0].storage.sinks
    ledger.places[:, :, sinks:] -= tokens
    ledger.origin, ledger.slid = ledger.origin + tokens, 0
    if tokens:
        back = torch.full((ledger.batch_size,), -tokens, device=ledger.device)
        _rotate(layers, decoder, slice(sinks, None), back)
    return tokens


def _rotate(layers: list[Any], decoder: Any, slots: slice, distance: Tensor, of: str = "") -> None:
    """Rotate the keys in `slots` by `distance` (B,) positions.

    With `of`, what is rotated are the keys that the layer holds beside its own under this name.
    """
    wide = torch.promote_types(layers[0].keys.dtype, torch.float32)
    turn = _turn(decoder, layers[0].keys.new_zeros(1, dtype=wide), distance[:, None])
    for layer in layers:
        cos, sin = (t.to(layer.keys.device) for t in turn)
        keys = layer.beside[of] if of else layer.keys[:, :, slots]
        layer.keys[:, :, slots] = rotate(keys.to(wide), cos, sin).to(keys.dtype)
