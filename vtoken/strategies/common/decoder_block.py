"""A layer like those of Llama and Qwen: RMS norms, causal attention with rotary positions, a gated MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...llm_shape import LanguageModelShape


def rotary(n: int, width: int, like: Tensor, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n, width) of the positions 0 .. n - 1, in the dtype and on the device of `like`."""
    rates = base ** (-torch.arange(0, width, 2, device=like.device) / width)
    angles = torch.arange(n, device=like.device)[:, None] * rates
    angles = torch.cat([angles, angles], 1)
    return angles.cos().to(like), angles.sin().to(like)


def turned(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys (heads, n, width) at their positions."""
    one, two = x.chunk(2, -1)
    return x * tables[0] + torch.cat([-two, one], -1) * tables[1]


class DecoderBlock(nn.Module):
    """A decoder layer of the shape of an LLM's; adds nothing at the start."""

    def __init__(self, shape: LanguageModelShape) -> None:
        super().__init__()
        d, wide = shape.hidden, shape.heads * shape.head_dim
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.before_attention, self.before_mlp = nn.RMSNorm(d, 1e-6), nn.RMSNorm(d, 1e-6)
        self.query = nn.Linear(d, wide, bias=False)
        self.key = nn.Linear(d, shape.kv_heads * shape.head_dim, bias=False)
        self.value = nn.Linear(d, shape.kv_heads * shape.head_dim, bias=False)
        self.out = nn.Linear(wide, d, bias=False)
        self.gate = nn.Linear(d, shape.intermediate, bias=False)
        self.up = nn.Linear(d, shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, d, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """One sequence (n, d) -> (n, d)."""
        seen = self.before_attention(x)
        query = self.query(seen).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        key, value = (
            part(seen).unflatten(-1, (self.kv_heads, -1)).transpose(0, 1) for part in (self.key, self.value)
        )
        tables, repeats = rotary(len(x), query.shape[-1], query), self.heads // self.kv_heads
        key, value = (y.repeat_interleave(repeats, 0)[None] for y in (turned(key, tables), value))
        mixed = F.scaled_dot_product_attention(turned(query, tables)[None], key, value, is_causal=True)
        x = x + self.out(mixed[0].transpose(0, 1).flatten(1))
        seen = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(seen)) * self.up(seen))
