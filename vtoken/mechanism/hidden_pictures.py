"""Pictures of which the tokens after them see only the marked tokens, in every layer of the LLM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .forward_context import Run


def marked_now(run: Run) -> Tensor:
    """(B, n) bool: the marked tokens after the entrance."""
    assert run.layout is not None and run.index is not None
    return run.layout.marked.gather(1, run.index) & run.now[0][1]


def hidden_now(run: Run) -> Tensor:
    """(B, n, n) bool: whether a token after the entrance (second axis) must not see another one (third)."""
    assert run.layout is not None and run.index is not None
    item, place = run.layout.item, torch.arange(run.query_length, device=run.index.device)
    last = item.new_full((len(item), int(item.max()) + 2), -1)  # the first column is for text
    last.scatter_reduce_(1, item + 1, place.expand_as(item), "amax")
    own = item.gather(1, run.index)
    lost = (own >= 0) & ~marked_now(run)
    return lost[:, None] & (run.index[:, :, None] > last.gather(1, own + 1)[:, None])


def hide(mask: Tensor | None, hidden: Tensor, past: int, keys: int) -> Tensor:
    """An attention mask (B or 1, heads or 1, n, keys) in which some tokens do not see others.

    Args:
        mask: bool, True where a token sees a key, or additive; None for a causal one.
        hidden: (B, n, n) bool, on the keys after the first `past` ones.
        keys: of a causal mask.
    """
    rows = hidden.shape[1]
    if mask is None:
        mask = torch.ones(rows, keys, dtype=torch.bool, device=hidden.device).tril(past)[None, None]
    hidden = torch.nn.functional.pad(hidden, (past, mask.shape[-1] - past - rows))[:, None].to(mask.device)
    off = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.where(hidden, torch.tensor(off, dtype=mask.dtype, device=mask.device), mask)


def adapted(run: Run, layer: int, hidden: Tensor, adapt: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Hidden states (B, n, d) before a layer, of the marked tokens as a strategy changes them."""
    marked = marked_now(run)
    if not bool(marked.any()):
        return hidden
    out = hidden.clone()
    out[marked] = adapt(layer, hidden[marked]).to(hidden)
    return out
