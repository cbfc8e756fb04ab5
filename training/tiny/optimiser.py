"""Muon for matrices, AdamW for the rest: small transformers need about half of AdamW's steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def orthogonal(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The matrix with ``update``'s singular vectors and singular values near one (Newton-Schulz, float32)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for weights of linear layers: orthogonalised momentum, float32."""

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float = 0.02, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def optimisers(named: Iterable[tuple[str, torch.nn.Parameter]], rate: float, muon_rate: float) -> list:
    """Muon for linear layers inside the transformer blocks, AdamW (``rate``) for all other parameters."""
    matrices, others = [], []
    for name, p in named:
        (matrices if p.ndim == 2 and ".layers." in name else others).append(p)
    return [
        Muon(matrices, lr=muon_rate),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
