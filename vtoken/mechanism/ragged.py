"""Rows of different lengths: gather and mask kept tokens per sample, aligned to the right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import gather_merge, gather_rows

USUAL = ("inputs_embeds", "attention_mask", "position_ids")


def right_aligned(keep: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """(B, n) bool -> index (B, m) int64 of kept tokens, aligned to the right, and valid (B, m) bool.

    m is at least `least`: if every row loses all its tokens, the language model still reads one filler.
    """
    count = keep.sum(1)
    longest = max(least, int(count.max()))
    order = torch.argsort(keep.to(torch.int8), dim=1, stable=True)[:, keep.shape[1] - longest :]
    valid = torch.arange(longest, device=keep.device)[None] >= (longest - count)[:, None]
    return torch.where(valid, order, 0), valid


def take_merged(
    x: Tensor, index: Tensor, valid: Tensor, into: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Gather kept tokens and add to them what they absorb: (B, n, d) -> (B, m, d).

    Args:
        x: (B, n, d).
        index, valid: (B, m), the result of `right_aligned`.
        into: (B, n) int64, the row of `x` that absorbs each row, -1 for none; None if nothing is merged.
        weight: (B, n) float32, the share with which each row is added.
    """
    if into is None or weight is None:
        return gather_merge(x, index)
    column = torch.full(x.shape[:2], -1, dtype=torch.long, device=index.device)
    row, place = valid.nonzero(as_tuple=True)
    column[row, index[row, place]] = place
    return gather_merge(x, index, torch.where(into >= 0, column.gather(1, into.clamp(min=0)), -1), weight)


def overwrite(x: Tensor, source: Tensor, features: Tensor) -> Tensor:
    """(B, m, d) with row `source[b, i]` of `features` (w, d) in place i if `source` (B, m) is >= 0."""
    rows = features.to(x)[source.clamp(min=0)]
    return torch.where((source >= 0)[..., None], rows, x)


def take(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Gather by index (B, m), a row per sample; x: (B, n, ...) for dim 1, (..., B, n) for dim -1."""
    index = index.to(x.device)
    if dim == -1:
        return x.gather(-1, index.expand(x.shape[:-1] + index.shape[-1:]))
    return gather_rows([x], index)[0]


def tokenwise(arguments: dict[str, Any], batch: int, tokens: int) -> dict[str, Tensor]:
    """Further arguments of a language model with a row for every token, by name: (batch, tokens, ...).

    Embeddings count under any name; of integers those whose name says that they are types of tokens.
    """
    found = {}
    for name, x in arguments.items():
        if not isinstance(x, Tensor) or name in USUAL or x.ndim < 2 or x.shape[1] != tokens:
            continue
        embeds = x.ndim > 2 and x.is_floating_point() and x.shape[0] in (1, batch)
        if embeds or name.endswith("token_type_ids"):
            found[name] = x.expand(batch, *x.shape[1:])
    return found


def check_cut(arguments: dict[str, Any], batch: int, tokens: int) -> None:
    """Raise NotImplementedError if a language model reads integers per token that nothing here shortens."""
    for name, x in arguments.items():
        whole = isinstance(x, Tensor) and x.shape in ((batch, tokens), (1, tokens))
        if whole and not x.is_floating_point() and x.dtype != torch.bool:
            raise NotImplementedError(
                f"The language model is given {name}, a number per token of the whole prompt, which vtoken"
                " does not shorten: use a model whose language model reads embeddings alone."
            )


def expand_batch(x: Tensor, batch_size: int) -> Tensor:
    """(..., 1 or B, n) -> (..., B, n)."""
    return x.expand(*x.shape[:-2], batch_size, x.shape[-1])
