"""Outputs per token of a model whose head reads every state: those of the tokens that the LLM read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .forward_context import Call, ForwardContext, ReadTokens
from .ragged import right_aligned, take


@torch.compiler.disable
def short_outputs(
    context: ForwardContext,
    merge: Callable[[dict[str, Any]], dict[str, Any]],
    original: Callable[..., Any],
    given: dict[str, Any],
) -> Any:
    """Call a model and cut its outputs per token to the tokens that the LLM read to its end.

    The head sees the prompt's length, which fits its mask, and acts on every token alone.

    Args:
        context: state of the calls of the patch.
        merge: `merge(arguments) -> arguments`, with pictures in the embeddings if the head would encode them.
        original: the model's forward.
        given: its arguments.

    Returns:
        The output, in which tensors (B, q, d) have become (B, m, d), rows aligned to the right and zero
        where a row has fewer than m tokens; as it is if nothing was dropped.
    """
    before, outer = context.read, context.early
    context.read, context.early = None, Call(input_ids=given.get("input_ids"))
    try:
        out = original(**merge(given))
        read = context.read
    finally:
        context.read, context.early = context.read or before, outer
    return out if read is None or torch.equal(read.real, read.kept) else _cut(out, read)


def _cut(out: Any, read: ReadTokens) -> Any:
    index, valid = right_aligned(read.kept)

    def cut(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(map(cut, value))
        if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[:2] != read.kept.shape:
            return value
        rows = take(value, index)
        return rows * valid[..., None].to(rows)

    if isinstance(out, dict):  # a ModelOutput
        for name, value in out.items():
            out[name] = cut(value)
        return out
    return cut(out)
