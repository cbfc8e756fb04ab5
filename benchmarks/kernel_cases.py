"""Cases of `kernels.py`: random inputs of real models' shapes, vtoken's kernels, and the usual code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtoken import kernels

Call = Callable[[], Any]
Case = tuple[Call, Call, int]
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "small": {
        "merge": (1, 576, 1024, 115), "cls": (3, 8, 145, 32), "text": (1, 8, 320, 64),
        "tower": (2, 8, 256, 32),
        "windows": (1, 8, 1024, 32), "tome": (1, 577, 64, 64), "select": (1, 576, 1024, 115),
        "kv": (4, 1, 4, 640, 64, 160),
    },
    "7b": {
        "merge": (8, 2880, 4096, 576), "cls": (5, 16, 577, 64), "text": (1, 32, 2944, 128),
        "tower": (5, 16, 729, 72),
        "windows": (1, 16, 5184, 80), "tome": (8, 577, 64, 64), "select": (1, 2880, 4096, 576),
        "kv": (32, 1, 32, 2944, 128, 640),
    },
}  # fmt: skip


def softmax_map(q: Tensor, k: Tensor, hidden: Tensor | None = None) -> Tensor:
    """The whole attention map, as in eager attention."""
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return (logits if hidden is None else logits.masked_fill(hidden, -torch.inf)).softmax(
        -1, dtype=torch.float32
    )


def naive_merge(x: Tensor, index: Tensor, into: Tensor, weight: Tensor) -> Tensor:
    """A gather, then a scatter of every weighted row into a float32 copy."""
    wide = torch.zeros(x.shape[0], index.shape[1], x.shape[2], device=x.device)
    wide.scatter_add_(1, into[..., None].expand_as(x), x.float() * weight[..., None])
    return wide.to(x.dtype)


def naive_farthest(x: Tensor, k: int) -> Tensor:
    """DivPrune as published: distance matrix, each step a minimum over all rows chosen so far."""
    unit = torch.nn.functional.normalize(x[0].float(), dim=-1)
    distance = 1 - unit @ unit.mT
    chosen = [(distance + torch.diag(torch.full((len(unit),), torch.inf, device=x.device))).amin(1).argmax()]
    for _ in range(k - 1):
        reach = distance[torch.stack(chosen)].amin(0)
        reach[torch.stack(chosen)] = -torch.inf
        chosen.append(reach.argmax())
    return torch.stack(chosen)[None]


def naive_greedy(x: Tensor, quality: Tensor, k: int) -> Tensor:
    """Greedy MAP on the whole kernel matrix."""
    unit = torch.nn.functional.normalize(x[0].float(), dim=-1)
    kernel = quality[0][:, None] * (unit @ unit.mT) * quality[0]
    left, rows, chosen = kernel.diagonal().clone(), kernel.new_zeros(k, len(unit)), []
    for t in range(k):
        pick = left.argmax()
        rows[t] = (kernel[pick] - rows[:t, pick] @ rows[:t]) / left[pick].sqrt()
        left = left - rows[t] ** 2
        left[pick] = -torch.inf
        chosen.append(pick)
    return torch.stack(chosen)[None]


def naive_cover(values: Tensor, k: int) -> Tensor:
    """Greedy coverage as published: the gains of all tokens in every step."""
    cover, gains, chosen = values[0].float(), values.new_zeros(values.shape[2]), []
    for _ in range(k):
        reach = (cover - gains).clamp(min=0).sum(-1)
        reach[chosen] = -torch.inf
        chosen.append(int(reach.argmax()))
        gains = torch.maximum(gains, cover[chosen[-1]])
    return torch.tensor(chosen, device=values.device)[None]


def naive_match(keys: Tensor, r: int) -> list[Tensor]:
    """ToMe's matching as published, after one CLS token: sources, targets, the rest in order, owners."""
    unit = keys.float() / keys.float().norm(dim=-1, keepdim=True)
    best, partner = (unit[:, 2::2] @ unit[:, 1::2].mT).max(-1)
    order = best.argsort(dim=-1, descending=True)
    order, rest = order[:, :r], order[:, r:].sort(-1).values
    source, target = 2 + 2 * order, 1 + 2 * partner.gather(1, order)
    places = torch.arange(keys.shape[1], device=keys.device).expand(len(keys), -1)
    keep = torch.cat([places[:, :1], 2 + 2 * rest, places[:, 1::2]], 1)
    owner = torch.zeros_like(places).scatter(1, keep, places[:, : keep.shape[1]])
    return [source, target, keep, owner.scatter(1, source, owner.gather(1, target))]


class Inputs:
    """Random inputs; a case: a call of vtoken's kernel, the usual code, bytes to move (0: no claim)."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device):
        self.shapes, self.device = shapes, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.generator = torch.Generator(device).manual_seed(0)

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(self.dtype)

    def share(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def some(self, batch: int, n: int, m: int) -> Tensor:
        return self.share(batch, n).argsort(1)[:, :m].sort(1).values

    def moving(self) -> dict[str, Case]:
        batch, n, d, m = self.shapes["merge"]
        x, index, weight = self.rand(batch, n, d), self.some(batch, n, m), self.share(batch, n)
        into = torch.randint(m, (batch, n), generator=self.generator, device=self.device)
        planes = [x, torch.arange(batch * n, device=self.device).view(batch, n), x[..., 0] > 0]
        row = d * x.element_size() * batch

        def gather(p: Tensor) -> Tensor:
            return p.gather(1, index.view(batch, m, *[1] * (p.ndim - 2)).expand(batch, m, *p.shape[2:]))

        return {
            "gather": (lambda: kernels.gather_merge(x, index), lambda: gather(x), 2 * m * row),
            "gather_merge": (
                lambda: kernels.gather_merge(x, index, into, weight),
                lambda: naive_merge(x, index, into, weight),
                (n + m) * row,
            ),
            "gather_rows": (
                lambda: kernels.gather_rows(planes, index),
                lambda: [gather(p) for p in planes],
                2 * m * (row + 9 * batch),
            ),
        }  # fmt: skip

    def attention_rows(self, name: str, first: int | None, last: int | None, reduce: str | None) -> Case:
        batch, heads, n, d = self.shapes[name]
        q, k = self.rand(batch, heads, n, d), self.rand(batch, heads, n, d)
        rows = slice(first, last)

        def usual() -> Tensor:
            seen = softmax_map(q, k)[:, :, rows]
            return seen.mean((1, 2)) if reduce else seen.clone()

        return lambda: kernels.attention_rows(q[:, :, rows], k, reduce=reduce), usual, 0

    def received(self, name: str, side: int | None) -> Case:
        batch, heads, n, d = self.shapes[name]
        q, k = self.rand(batch, heads, n, d), self.rand(batch, heads, n, d)
        cuts = torch.arange(0, n + 1, side or n, device=self.device)
        window = torch.arange(n, device=self.device) // (side or n)
        hidden = window[:, None] != window if side else None

        def usual() -> Tensor:
            return softmax_map(q, k, hidden).sum((1, 2)) / (heads * (side or n))

        return lambda: kernels.received_attention(q, k, cu_seqlens=cuts), usual, 0

    def selecting(self) -> dict[str, Case]:
        batch, n, d, r = self.shapes["tome"]
        keys = self.rand(batch, n, d)
        batch, n, d, k = self.shapes["select"]
        x, quality = self.rand(batch, n, d), self.share(batch, n) + 0.1
        unit = torch.nn.functional.normalize(x.float(), dim=-1)
        alike = unit @ unit.mT
        return {
            "bipartite_match": (
                lambda: list(kernels.bipartite_match(keys, r, 1)), lambda: naive_match(keys, r), 0
            ),
            "farthest_point": (lambda: kernels.farthest_point(x, k), lambda: naive_farthest(x, k), 0),
            "greedy_map": (lambda: kernels.greedy_map(x, quality, k), lambda: naive_greedy(x, quality, k), 0),
            "greedy_cover": (lambda: kernels.greedy_cover(alike, k), lambda: naive_cover(alike, k), 0),
        }  # fmt: skip

    def cache(self) -> Case:
        layers, batch, heads, n, d, m = self.shapes["kv"]
        tensors = [self.rand(batch, heads, n, d) for _ in range(2 * layers)]
        index = self.some(batch, n, m)
        columns = index[:, None, :, None].expand(batch, heads, m, d)
        nbytes = 2 * len(tensors) * batch * heads * m * d * tensors[0].element_size()
        return (
            lambda: kernels.kv_compact(tensors[:layers], tensors[layers:], index),
            lambda: [t.gather(2, columns) for t in tensors], nbytes,
        )  # fmt: skip

    def all(self) -> dict[str, Case]:
        return {
            **self.moving(),
            "attention_rows: CLS": self.attention_rows("cls", 0, 1, None),
            "attention_rows: mean of the last 32": self.attention_rows("text", -32, None, "mean"),
            "received_attention": self.received("tower", None),
            "received_attention: windows of 64": self.received("windows", 64),
            **self.selecting(),
            "kv_compact": self.cache(),
        }
