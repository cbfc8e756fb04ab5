"""Muon for the matrices and AdamW for the rest: small models learn in half the steps of AdamW alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch's Muon in the parameters' own dtype: its bfloat16 takes most of a step's time on many CPUs."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of all matrices that have a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                turned = orthogonal(p.grad.lerp(mean, group["momentum"]), group["ns_coefficients"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(turned, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int = 5) -> Tensor:
    """The nearest matrix with singular values near 1, by Newton-Schulz iteration."""
    a, b, c = coefficients
    wide = x.T if x.shape[0] > x.shape[1] else x
    y = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = y @ y.T
        y = torch.addmm(y, torch.addmm(square, square, square, beta=b, alpha=c), y, beta=a)
    return y.T if wide is not x else y


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
    return [Muon(matrices, lr=muon_rate, weight_decay=0.01), adam] if matrices else [adam]
