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

__all__ = [
    "Match", "attention_rows", "backend", "bipartite_match", "farthest_point", "gather_merge", "gather_rows",
    "get_backend", "greedy_cover", "greedy_map", "kv_compact", "merge_weighted", "received_attention",
    "set_backend",
]  # fmt: skip


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _shape(t: Tensor) -> str:
    return "(" + ", ".join(map(str, t.shape)) + ")"


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
            f"gather_merge takes x (B, n, d) and index (B, m); found {_shape(x)} and {_shape(index)}."
        )
    if weight is not None and into is None:
        raise ValueError(
            "gather_merge was given weight without into; name the column each weighted row goes into."
        )
    for name, t in (("into", into), ("weight", weight)):
        if t is not None and t.shape != x.shape[:2]:
            raise ValueError(f"gather_merge takes {name} of shape {tuple(x.shape[:2])}; found {_shape(t)}.")
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
                f" shape {_shape(index)}; found {_shape(x)}."
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
                f" {_shape(mask)}."
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
            f"received_attention takes as many queries as keys; found {_shape(q)} and {_shape(k)}."
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
            f"found {_shape(q)} and {_shape(k)}."
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
            f"bipartite_match takes keys (B, n, d), 0 <= protect <= n; found {_shape(keys)}, {protect}."
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


def farthest_point(features: Tensor, k: int, start: int | Tensor | None = None) -> Tensor:
    """Greedy max-min selection by cosine distance (DivPrune, arXiv 2503.02175).

    The first pick is the token farthest from its nearest other token, or `start` (int, or int (B,)); every
    next pick is the unselected token whose nearest selected token is farthest. Distances within 1e-6 tie, to
    the lower index.

    Args:
        features: (B, n, d). k: number of tokens, at most n.

    Returns (B, k) int64 in the order of selection (so the first j are the selection for j). O(n d) a step;
    the torch twin keeps the n x n cosines only while n <= d. A zero vector is at distance 1 from all. No
    gradient. Raises ValueError for shapes or counts that do not fit.
    """
    _check_selection("farthest_point", features, k)
    if isinstance(start, int):
        if features.shape[1] and not 0 <= start < features.shape[1]:
            raise ValueError(
                f"farthest_point starts at a token in 0 to {features.shape[1] - 1}; found {start}."
            )
        start = torch.full((features.shape[0],), start, device=features.device)
    elif start is not None:
        if start.shape != features.shape[:1]:
            raise ValueError(
                f"farthest_point takes start of shape ({features.shape[0]},); found {_shape(start)}."
            )
        reference.check_index(start, 0, features.shape[1], "start")
        start = start.to(features.device, torch.long)
    return ops.farthest_point(features.detach(), k, start)


def greedy_map(features: Tensor, quality: Tensor, k: int) -> Tensor:
    """Greedy MAP inference of a determinantal point process (Chen et al. 2018, arXiv 1709.05135; CDPruner).

    The kernel is L = diag(quality) S diag(quality) with S the cosine similarity of the features; each step
    adds the token that multiplies det(L) of the selection most, by an incremental Cholesky factor of k rows.
    A token's gain is at least 1e-5 of its own quality squared, so quality decides once the rank of the
    features is used up. Gains within a factor of 1e-5 tie, to the lower index.

    Args:
        features: (B, n, d). quality: (B, n), not negative. k: number of tokens, at most n.

    Returns (B, k) int64 in the order of selection. No gradient. Raises ValueError for shapes or counts that
    do not fit.
    """
    _check_selection("greedy_map", features, k)
    if quality.shape != features.shape[:2]:
        raise ValueError(
            f"greedy_map takes quality of shape {tuple(features.shape[:2])}; found {_shape(quality)}."
        )
    return ops.greedy_map(features.detach(), quality.detach(), k)


def greedy_cover(values: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """Greedy maximisation of coverage, a facility location function (SCOPE, arXiv 2510.24214).

    Token i covers thing j as well as `values[b, i, j]` says, a selection as well as its best token, and at
    least 0. Each step adds the token with the largest product of its weight and what it adds to the sum over
    all things. What exceeds the present coverage of a thing by less than 1e-6 of its largest value counts as
    nothing. Products within a factor of 1e-5 tie, to the lower index.

    Args:
        values: (B, n, m). k: number of tokens, at most n.
        weight: (B, n), not negative; 1 if not given.

    Returns (B, k) int64 in the order of selection (so the first j are the selection for j). The torch twin is
    lazy: gains only shrink, so that it computes those of a step's best candidates alone. No gradient. Raises
    ValueError for shapes or counts that do not fit.
    """
    if values.ndim != 3:
        raise ValueError(f"greedy_cover takes values (B, n, m); found {_shape(values)}.")
    _check_selection("greedy_cover", values, k)
    if weight is None:
        weight = torch.ones(values.shape[:2], device=values.device)
    elif weight.shape != values.shape[:2]:
        raise ValueError(
            f"greedy_cover takes weight of shape {tuple(values.shape[:2])}; found {_shape(weight)}."
        )
    return ops.greedy_cover(values.detach(), weight.detach(), k)


def _check_selection(name: str, features: Tensor, k: int) -> None:
    if features.ndim != 3:
        raise ValueError(f"{name} takes features (B, n, d); found {_shape(features)}.")
    if not 0 <= k <= features.shape[1]:
        raise ValueError(
            f"{name} can select 0 to {features.shape[1]} of {features.shape[1]} tokens; found k = {k}."
        )


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
                f" {_shape(t)} beside {_shape(tensors[0])}, index {_shape(index)}."
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
