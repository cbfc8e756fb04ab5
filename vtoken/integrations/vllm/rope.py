"""Rows of the LLM's table of rotary embeddings, which vLLM makes for as many positions as tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def extend_rope(llm: nn.Module, rows: int) -> None:
    """Give every table of an LLM at least so many rows; those that it has stay as they are.

    A generated token can have a position beyond the tokens of its sequence where dropped tokens keep theirs.

    Raises:
        ValueError: for a rotary embedding whose values depend on the number of rows.
    """
    for module in llm.modules():
        table = getattr(module, "cos_sin_cache", None)
        if isinstance(table, Tensor) and len(table) < rows:
            _extend(module, table, rows)


def _extend(module: Any, table: Tensor, rows: int) -> None:
    before = module.max_position_embeddings
    module.max_position_embeddings = before + rows - len(table)
    with torch.device(table.device):
        longer = module._compute_cos_sin_cache().to(table)
    if len(longer) < rows or not torch.allclose(longer[: len(table)], table, atol=1e-6):
        module.max_position_embeddings = before
        raise ValueError(
            f"Original positions need a longer table of rotary embeddings, whose values would change for"
            f" {type(module).__name__}: use positions='renumber'."
        )
    module.cos_sin_cache = longer
    if getattr(module, "cos_sin_cache_bf16", None) is not None:
        module.cos_sin_cache_bf16 = longer.to(torch.bfloat16)
