"""Kernels for visual token reduction: Triton on CUDA tensors, plain torch elsewhere, with equal results.

Every function takes strided tensors as they are, computes in float32, is deterministic, and is a registered
torch custom op (`torch.ops.vtoken.*`), so `torch.compile` traces it. If an input requires grad (and grad mode
is on), the differentiable torch twin runs with every backend. Indices are checked on the CPU (IndexError); on
a GPU an index out of range is the caller's error, as in any gather. Importing this module does not import
triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .dispatch import backend, get_backend, set_backend
from .greedy import farthest_point, greedy_cover, greedy_map, shape_of
from .packing import pack_codes, unpack_rows

__all__ = [
    "Match", "attention_rows", "backend", "bipartite_match", "farthest_point", "gather_merge", "gather_rows",
    "get_backend", "greedy_cover", "greedy_map", "kv_compact", "merge_weighted", "pack_codes",
    "received_attention", "set_backend", "unpack_rows",
]  # fmt: skip


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def gather_merge(
    x: Tensor, index: Tensor, into: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Gather the kept rows and add the absorbed ones to them, in one pass.

    Args:
        x: (B, n, d) floating point; or (n, d), with all other arguments without their batch axis too.
        index: (B, m) int64: column j of the result is the copy of row `index[b, j]`...
        into: (B, n) int64 in [-1, m), optional: ...unless some rows name it, `into[b, i] == j`; then it is
            the sum of `weight[b, i] * x[b, i]` over exactly those rows. -1 goes nowhere. A kept row that also
            absorbs others must therefore name its own column.
        weight: (B, n) float32, optional: 1 if not given.

    Returns (B, m, d) in the dtype of `x`, summed in float32; a row alone in its column with weight 1 is
    bit-identical to the copy. Differentiable in `x` and `weight`. Raises ValueError for shapes that do not
    fit.
    """
    if x.ndim == 2 and index.ndim == 1:
        one = (None if into is None else into[None], None if weight is None else weight[None])
        return gather_merge(x[None], index[None], *one)[0]
    if x.ndim != 3 or index.ndim != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(
            f"gather_merge takes x (B, n, d) and index (B, m); found {shape_of(x)} and {shape_of(index)}."
        )
    if weight is not None and into is None:
        raise ValueError(
            "gather_merge was given weight without into; name the column each weighted row goes into."
        )
    for name, t in (("into", into), ("weight", weight)):
        if t is not None and t.shape != x.shape[:2]:
            raise ValueError(f"gather_merge takes {name} of shape {tuple(x.shape[:2])}; found {shape_of(t)}.")
    if _wants_grad(x, weight):
        return reference.gather_merge(x, index, into, weight)
    return ops.gather_merge(x, index, into, weight)


def gather_rows(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Gather several tensors (B, n, ...) of any dtypes with one `index` (B, m) int64, in one launch.

    For tensors that travel with the embeddings: positions, masks, DeepStack planes. Without batch axis:
    (n, ...) and (m,). Returns new tensors (B, m, ...). Raises ValueError for shapes that do not fit.
    """
    tensors = list(tensors)
    if index.ndim == 1:
        return [x[0] for x in gather_rows([x[None] for x in tensors], index[None])]
    for x in tensors:
        if x.ndim < 2 or x.shape[:2] != (index.shape[0], tensors[0].shape[1]):
            raise ValueError(
                f"gather_rows takes tensors ({index.shape[0]}, {tensors[0].shape[1]}, ...) for an index of"
                f" shape {shape_of(index)}; found {shape_of(x)}."
            )
    return reference.gather_rows(tensors, index) if _wants_grad(*tensors) else ops.gather_rows(tensors, index)


def attention_rows(
    q: Tensor, k: Tensor, scale: float | None = None, mask: Tensor | None = None, reduce: str | None = None
) -> Tensor:
    """Softmax attention of a few query rows over all keys, without the n x n map.

    Args:
        q: (B, H, r, d), the query rows wanted. k: (B, Hk, n, d), H a multiple of Hk (query head h reads key
            head h // (H // Hk)). Rotary embedding, if any, already applied to both.
        scale: factor on the logits, d ** -0.5 if None.
        mask: bool (B, n) or (B, r, n), or with batch 1; True if a key may be seen. Rows that see nothing give
            zeros.
        reduce: None, or "mean" or "sum" over heads and rows (Triton never builds the (B, H, r, n) rows for
            it).

    Returns (B, H, r, n), or (B, n) when reduced, in float32 (float64 for float64 input). Differentiable.
    Raises ValueError for shapes that do not fit.
    """
    _check_heads("attention_rows", q, k)
    if reduce not in (None, "mean", "sum"):
        raise ValueError(f"attention_rows reduces by None, 'mean' or 'sum'; found {reduce!r}.")
    if mask is not None:
        fits = ((q.shape[0], k.shape[2]), (q.shape[0], q.shape[2], k.shape[2]))
        if (
            mask.dtype != torch.bool
            or mask.ndim not in (2, 3)
            or not (mask.shape[0] in (1, q.shape[0]) and mask.shape[1:] == fits[mask.ndim - 2][1:])
        ):
            raise ValueError(
                f"attention_rows takes a bool mask of shape {fits[0]} or {fits[1]}; found {mask.dtype}"
                f" {shape_of(mask)}."
            )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if _wants_grad(q, k):
        return reference.attention_rows(q, k, scale, mask, reduce)
    return ops.attention_rows(q, k, scale, mask, reduce)


def received_attention(
    q: Tensor, k: Tensor, scale: float | None = None, cu_seqlens: Tensor | None = None, chunk: int = 256
) -> Tensor:
    """Attention that each key receives: the mean over heads and over the queries of its own window.

    No n x n map is built.

    Args:
        q: (B, H, n, d). k: (B, Hk, n, d), H a multiple of Hk, both as the tower's softmax sees them.
        scale: factor on the logits, d ** -0.5 if None.
        cu_seqlens: (s + 1,) int, rising from 0 to n: bounds of windows (or images) that do not see each
            other. One window if None. On the torch path its values are read on the host.
        chunk: queries per step of the torch path, which holds chunk x n logits per head.

    Returns (B, n) in float32 (float64 for float64 input); the values of one window sum to 1. Differentiable.
    Raises ValueError for shapes or bounds that do not fit.
    """
    _check_heads("received_attention", q, k)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"received_attention takes as many queries as keys; found {shape_of(q)} and {shape_of(k)}."
        )
    if chunk < 1:
        raise ValueError(f"received_attention takes a chunk of at least 1 query; found {chunk}.")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if _wants_grad(q, k):
        return reference.received_attention(q, k, scale, cu_seqlens, chunk)
    return ops.received_attention(q, k, scale, cu_seqlens, chunk)


def _check_heads(name: str, q: Tensor, k: Tensor) -> None:
    fits = (
        q.ndim == k.ndim == 4 and q.shape[::3] == k.shape[::3] and k.shape[1] and q.shape[1] % k.shape[1] == 0
    )
    if not fits:
        raise ValueError(
            f"{name} takes q (B, H, rows, d) and k (B, Hk, n, d) with H a multiple of Hk; "
            f"found {shape_of(q)} and {shape_of(k)}."
        )


class Match(NamedTuple):
    """Pairs found by `bipartite_match`, as int64 token positions before the merge.

    source (B, r) is merged into target (B, r), best pair first; keep (B, n - r) lists the tokens that stay,
    in output order; owner (B, n) is the output position each token ends up in, so `merged.gather(1, owner)`
    undoes the merge.
    """

    source: Tensor
    target: Tensor
    keep: Tensor
    owner: Tensor


def bipartite_match(keys: Tensor, r: int, protect: int = 0, sort: bool = True) -> Match:
    """Bipartite soft matching of ToMe (arXiv 2210.09461) by the cosine of the keys.

    Unprotected tokens at even positions (set A) each find their most similar token at an odd position (set
    B); the r most similar of A are merged into their partners, several into one if it so happens. Ties go to
    the lower index.

    Args:
        keys: (B, n, d), usually the attention keys averaged over heads.
        r: tokens to merge away, capped at (n - protect) // 2.
        protect: prefix tokens (CLS, registers) that neither merge nor absorb.
        sort: keep the unmerged tokens of A in ascending order; False leaves them by falling similarity.

    Returns a `Match` whose order is prefix, unmerged A, B; it carries no gradient. With r = 0 nothing moves.
    Raises ValueError for shapes or counts that do not fit.
    """
    if keys.ndim != 3 or not 0 <= protect <= keys.shape[1]:
        raise ValueError(
            f"bipartite_match takes keys (B, n, d), 0 <= protect <= n; found {shape_of(keys)}, {protect}."
        )
    return Match(*ops.bipartite_match(keys.detach(), r, protect, sort))


def merge_weighted(x: Tensor, match: Match, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Size-weighted average of merged tokens (ToMe, arXiv 2210.09461).

    x (B, n, d); size (B, n), the number of original patches in each token, 1 where not given. Returns the
    merged tokens (B, n - r, d) in the dtype of `x` and their sizes (B, n - r) in float32. Unmerged tokens
    stay bit-identical.
    """
    sizes = torch.ones(x.shape[:2], device=x.device) if size is None else size.float()
    total = torch.zeros(match.keep.shape, device=x.device).scatter_add(1, match.owner, sizes)
    weight = sizes / total.gather(1, match.owner)
    return gather_merge(x, match.keep, match.owner, weight), total


def kv_compact(
    keys: Sequence[Tensor], values: Sequence[Tensor], index: Tensor, inplace: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Keep the columns `index` of the keys and values of all layers, in one launch.

    Args:
        keys, values: per layer (B, Hk, n, d), all with the same B, Hk and n.
        index: (B, m) int64.
        inplace: move the columns to the front of the given tensors and return views of them; `index` must
            then be strictly ascending. Otherwise the results are copies.

    Returns (keys, values), lists of (B, Hk, m, d). Raises ValueError for shapes that do not fit.
    """
    tensors = [*keys, *values]
    for t in tensors:
        if (
            t.ndim != 4
            or index.ndim != 2
            or t.shape[0] != index.shape[0]
            or t.shape[:3] != tensors[0].shape[:3]
        ):
            raise ValueError(
                "kv_compact takes tensors (B, Hk, n, d) of one B, Hk and n and an index (B, m); found"
                f" {shape_of(t)} beside {shape_of(tensors[0])}, index {shape_of(index)}."
            )
    if inplace and tensors:
        if index.shape[1] > tensors[0].shape[2]:
            raise ValueError(
                f"kv_compact in place keeps at most {tensors[0].shape[2]} columns, not {index.shape[1]}."
            )
        ops.kv_compact_(tensors, index)
        out = [t[:, :, : index.shape[1]] for t in tensors]
    elif _wants_grad(*tensors):
        out = reference.kv_gather(tensors, index)
    else:
        out = ops.kv_gather(tensors, index)
    return out[: len(keys)], out[len(keys) :]
