"""The kernels as torch custom ops, so that torch.compile and torch.export trace them without a graph break.

An op picks its backend when it runs, not when it is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import reference, reference_pack, reference_select
from .dispatch import use_triton


def _triton() -> ModuleType:
    from . import triton

    return triton


def _op(
    fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as `torch.ops.vtoken.<name>`; eager calls skip the dispatcher, to save its time."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        op = custom_op(f"vtoken::{fn.__name__}", mutates_args=mutates)(fn)
        op.register_fake(fake)

        def call(*args: Any) -> Any:
            first = args[0][0] if isinstance(args[0], list) and args[0] else args[0]
            plain = type(first) is Tensor and first.device.type != "meta" and not mutates
            return fn(*args) if plain and not torch.compiler.is_compiling() else op(*args)

        return call

    return register


def _fake_gather_merge(x, index, into, weight):
    return x.new_empty(x.shape[0], index.shape[1], x.shape[2])


@_op(_fake_gather_merge)
def gather_merge(x: Tensor, index: Tensor, into: Tensor | None, weight: Tensor | None) -> Tensor:
    if use_triton(x):
        return _triton().gather_merge(x, index, into, weight)
    return reference.gather_merge(x, index, into, weight)


def _fake_gather_rows(tensors, index):
    return [x.new_empty(*index.shape, *x.shape[2:]) for x in tensors]


@_op(_fake_gather_rows)
def gather_rows(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    if use_triton(index, any_dtype=True):
        return _triton().gather_rows(tensors, index)
    return reference.gather_rows(tensors, index)


def _fake_attention_rows(q, k, scale, mask, reduce):
    (batch, heads, rows, _), n = q.shape, k.shape[2]
    shape = (batch, heads, rows, n) if reduce is None else (batch, n)
    return q.new_empty(shape, dtype=reference.compute_dtype(q))


@_op(_fake_attention_rows)
def attention_rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, reduce: str | None) -> Tensor:
    if use_triton(q):
        return _triton().attention_rows(q, k, scale, mask, reduce)
    return reference.attention_rows(q, k, scale, mask, reduce)


def _fake_received_attention(q, k, scale, cu_seqlens, chunk):
    return q.new_empty(q.shape[0], q.shape[2], dtype=reference.compute_dtype(q))


@_op(_fake_received_attention)
def received_attention(q: Tensor, k: Tensor, scale: float, cu_seqlens: Tensor | None, chunk: int) -> Tensor:
    if use_triton(q):
        return _triton().received_attention(q, k, scale, cu_seqlens, chunk)
    return reference.received_attention(q, k, scale, cu_seqlens, chunk)


def _fake_bipartite_match(keys, r, protect, sort):
    batch, n, _ = keys.shape
    r = max(0, min(r, (n - protect) // 2))
    return [keys.new_empty(batch, size, dtype=torch.long) for size in (r, r, n - r, n)]


@_op(_fake_bipartite_match)
def bipartite_match(keys: Tensor, r: int, protect: int, sort: bool) -> list[Tensor]:
    if use_triton(keys):
        return _triton().bipartite_match(keys, r, protect, sort)
    return reference_select.bipartite_match(keys, r, protect, sort)


def _fake_farthest_point(features, k, start):
    return features.new_empty(features.shape[0], k, dtype=torch.long)


@_op(_fake_farthest_point)
def farthest_point(features: Tensor, k: int, start: Tensor | None) -> Tensor:
    if use_triton(features):
        return _triton().farthest_point(features, k, start)
    return reference_select.farthest_point(features, k, start)


def _fake_greedy_map(features, quality, k):
    return features.new_empty(features.shape[0], k, dtype=torch.long)


@_op(_fake_greedy_map)
def greedy_map(features: Tensor, quality: Tensor, k: int) -> Tensor:
    if use_triton(features):
        return _triton().greedy_map(features, quality, k)
    return reference_select.greedy_map(features, quality, k)


def _fake_greedy_cover(values, weight, k):
    return values.new_empty(values.shape[0], k, dtype=torch.long)


@_op(_fake_greedy_cover)
def greedy_cover(values: Tensor, weight: Tensor, k: int) -> Tensor:
    if use_triton(values):
        return _triton().greedy_cover(values, weight, k)
    return reference_select.greedy_cover(values, weight, k)


def _fake_kv_gather(tensors, index):
    return [t.new_empty(*t.shape[:2], index.shape[1], t.shape[3]) for t in tensors]


@_op(_fake_kv_gather)
def kv_gather(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    if use_triton(index, any_dtype=True):
        return _triton().kv_gather(tensors, index)
    return reference.kv_gather(tensors, index)


def _fake_kv_compact(tensors, index):
    return None


@_op(_fake_kv_compact, mutates=("tensors",))
def kv_compact_(tensors: list[Tensor], index: Tensor) -> None:
    if use_triton(index, any_dtype=True):
        return _triton().kv_compact_(tensors, index)
    return reference.kv_compact_(tensors, index)


def _fake_pack_codes(codes, levels):
    return codes.new_empty(*codes.shape[:-1], reference_pack.width_of(codes.shape[-1], levels))


@_op(_fake_pack_codes)
def pack_codes(codes: Tensor, levels: int) -> Tensor:
    if use_triton(codes, any_dtype=True):
        return _triton().pack_codes(codes, levels)
    return reference_pack.pack_codes(codes, levels)


def _fake_unpack_rows(packed, step, zero, levels, centre, tokens, channels, index):
    rows = packed.shape[2] * tokens if index is None else index.shape[1]
    return step.new_empty(*packed.shape[:2], rows, channels)


@_op(_fake_unpack_rows)
def unpack_rows(
    packed: Tensor,
    step: Tensor,
    zero: Tensor | None,
    levels: int,
    centre: float,
    tokens: int,
    channels: int,
    index: Tensor | None,
) -> Tensor:
    if use_triton(step):
        return _triton().unpack_rows(packed, step, zero, levels, centre, tokens, channels, index)
    return reference_pack.unpack_rows(packed, step, zero, levels, centre, tokens, channels, index)
