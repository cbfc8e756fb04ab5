"""Layers that know the time step of a frame: sinusoids, modulated norms, causal attention across frames."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINUSOIDS = 256


class TimeEmbedding(nn.Module):
    """Vectors of time steps: 256 sinusoids and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(SINUSOIDS, width), nn.Linear(width, width)

    def forward(self, steps: Tensor) -> Tensor:
        """(t,) float32 -> (t, width)."""
        half = SINUSOIDS // 2
        rates = torch.exp(torch.arange(half, device=steps.device) * (-math.log(10000.0) / half))
        angles = steps[:, None].float() * rates
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        return self.fc2(F.silu(self.fc1(waves.to(self.fc1.weight.dtype))))


class ModulatedNorm(nn.Module):
    """Layer norm whose scale and shift depend on the time step (AdaLN); a plain one at the start."""

    def __init__(self, width: int, time_width: int, affine: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=affine)
        self.modulation = nn.Linear(time_width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (t, ..., width), time (t, time_width)."""
        shift, scale = self.modulation(F.silu(time)).chunk(2, -1)
        shape = (len(x), *[1] * (x.ndim - 2), x.shape[-1])
        return self.norm(x) * (1 + scale.view(shape)) + shift.view(shape)


class TemporalAttention(nn.Module):
    """Every token attends to those at its place in its own and in earlier frames; adds nothing at the start.

    Args:
        width: channels.
        heads: attention heads.
        time_width: of the time embedding.
        gate: factor on what is added: "vector" and "scalar" are trained from zero, "none" is 1.
        window: frames that a frame attends to, itself included; None for all.
    """

    def __init__(self, width: int, heads: int, time_width: int, gate: str, window: int | None) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = ModulatedNorm(width, time_width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        size = {"vector": width, "scalar": 1, "none": 0}[gate]
        self.gate = nn.Parameter(torch.zeros(size)) if size else None

    def forward(
        self, x: Tensor, time: Tensor, past: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (t, n, width) after the attention, and keys and values for the frames after it.

        Args:
            x: the frames of one sequence.
            time: (t, time_width).
            past: keys and values (n, heads, p, head_dim) of the p frames before.
        """
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3)
            for part in self.qkv(self.norm(x, time)).chunk(3, -1)
        )
        if past:
            key, value = (torch.cat([p.to(new), new], 2) for p, new in zip(past, (key, value), strict=True))
        mixed = F.scaled_dot_product_attention(query, key, value, self._mask(len(x), key.shape[2], x.device))
        added = self.out(mixed.permute(2, 0, 1, 3).flatten(2))
        first = 0 if self.window is None else max(0, key.shape[2] - self.window + 1)
        return x + (added if self.gate is None else self.gate * added), (
            key[:, :, first:],
            value[:, :, first:],
        )

    def _mask(self, frames: int, keys: int, device: torch.device) -> Tensor:
        """(frames, keys) bool, True where a frame sees another."""
        age = torch.arange(keys - frames, keys, device=device)[:, None] - torch.arange(keys, device=device)
        return (age >= 0) if self.window is None else (age >= 0) & (age < self.window)


def shuffled(maps: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Maps (m, h, w, C) as (m, rows * columns, side * side * C): squares of side x side places, row by row.

    A map of another size is resized first (bilinear, antialiased).
    """
    if maps.shape[1:3] != (rows * side, columns * side):
        wide = maps.movedim(-1, 1).float()
        wide = F.interpolate(wide, (rows * side, columns * side), mode="bilinear", antialias=True)
        maps = wide.movedim(1, -1).to(maps.dtype)
    squares = maps.unflatten(2, (columns, side)).unflatten(1, (rows, side))
    return squares.movedim(3, 2).reshape(len(maps), rows * columns, -1)


class Connector(nn.Module):
    """Tokens from the squares of a tower's map, by a norm and an MLP that add nothing at the start.

    Args:
        tower_width: channels of the map.
        side: a token is made of side x side places.
        width: channels of the tokens.
        time_width: of the time embedding; None for a connector that does not know the time step.
    """

    def __init__(self, tower_width: int, side: int, width: int, time_width: int | None) -> None:
        super().__init__()
        self.side, inner = side, side * side * tower_width
        self.time = None if time_width is None else TimeEmbedding(time_width)
        self.norm: nn.Module = nn.LayerNorm(inner)
        if time_width is not None:
            self.norm = ModulatedNorm(inner, time_width, affine=True, eps=1e-5)
        self.fc1, self.fc2 = nn.Linear(inner, width), nn.Linear(width, width)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, maps: Tensor, steps: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps (t, h, w, tower_width) at time steps (t,) -> (t, rows * columns, width) of a grid."""
        x = shuffled(maps.to(self.fc1.weight), *grid, self.side)
        x = self.norm(x) if self.time is None else self.norm(x, self.time(steps.to(x.device)))
        return self.fc2(F.gelu(self.fc1(x)))
