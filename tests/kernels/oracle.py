"""The kernels written naively in float64, one formula a line, with loops; independent of vtoken."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def gather_merge(x: Tensor, index: Tensor, into: Tensor | None, weight: Tensor | None) -> Tensor:
    out = torch.empty(*index.shape, x.shape[2], dtype=torch.float64)
    for b in range(index.shape[0]):
        for j in range(index.shape[1]):
            rows = [] if into is None else [i for i in range(x.shape[1]) if into[b, i] == j]
            if rows:
                weights = [1.0 if weight is None else weight[b, i].double() for i in rows]
                out[b, j] = sum(w * x[b, i].double() for w, i in zip(weights, rows))
            else:
                out[b, j] = x[b, index[b, j]].double()
    return out


def attention(q: Tensor, k: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    (batch, heads, rows, d), (_, kv_heads, n, _) = q.shape, k.shape
    out = torch.zeros(batch, heads, rows, n, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                logits = (
                    k[b, h // (heads // kv_heads)].double()
                    @ q[b, h, r].double()
                    * (scale or 1 / math.sqrt(d))
                )
                seen = torch.ones(n, dtype=torch.bool)
                if mask is not None:
                    seen = mask[b % mask.shape[0]] if mask.ndim == 2 else mask[b % mask.shape[0], r]
                if seen.any():
                    e = torch.where(seen, (logits - logits[seen].max()).exp(), 0.0)
                    out[b, h, r] = e / e.sum()
    return out


def received(q: Tensor, k: Tensor, scale: float | None, bounds: list[int]) -> Tensor:
    out = torch.zeros(q.shape[0], q.shape[2], dtype=torch.float64)
    for start, stop in pairwise(bounds):
        if stop > start:
            own = slice(start, stop)
            out[:, own] = attention(q[:, :, own], k[:, :, own], scale, None).mean((1, 2))
    return out


def cosines(x: Tensor) -> Tensor:
    unit = x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return unit @ unit.mT


def masked_tome(keys: Tensor, r: int, protect: int) -> tuple[list[int], list[int]]:
    """ToMe's own formulation for one sample: even against odd positions, protected rows and columns at -inf."""
    if not min(r, (len(keys) - protect) // 2):
        return [], []
    score = cosines(keys)[::2, 1::2].clone()
    score[[i for i in range(score.shape[0]) if 2 * i < protect]] = -math.inf
    score[:, [j for j in range(score.shape[1]) if 2 * j + 1 < protect]] = -math.inf
    best, partner = score.max(1)
    order = sorted(range(len(best)), key=lambda i: -best[i])[: min(r, (len(keys) - protect) // 2)]
    return [2 * i for i in order], [2 * int(partner[i]) + 1 for i in order]


def farthest_point(x: Tensor, k: int, start: int | None) -> list[int]:
    distance, n = 1 - cosines(x), len(x)
    others = distance + torch.eye(n) * 1e9
    chosen = [int(others.min(1).values.argmax()) if start is None else start][:k]
    while len(chosen) < k:
        reach = distance[:, chosen].min(1).values
        reach[chosen] = -math.inf
        chosen.append(int(reach.argmax()))
    return chosen


def greedy_map(x: Tensor, quality: Tensor, k: int) -> list[int]:
    """Each step takes the token with the largest log-determinant of the selection's kernel."""
    q = quality.double()
    kernel = q[:, None] * cosines(x) * q[None, :]
    chosen: list[int] = []
    for _ in range(k):
        gains = torch.full((len(x),), -math.inf, dtype=torch.float64)
        for i in set(range(len(x))) - set(chosen):
            picked = [*chosen, i]
            gains[i] = torch.linalg.slogdet(kernel[picked][:, picked]).logabsdet
        chosen.append(int(gains.argmax()))
    return chosen


def greedy_cover(values: Tensor, weight: Tensor, k: int) -> list[int]:
    """Each step takes the token with the largest product of its weight and what it adds to the coverage."""
    v, w = values.double().tolist(), weight.double().tolist()
    covered, chosen = [0.0] * len(v[0]), []
    for _ in range(k):
        scores = [-math.inf] * len(v)
        for i in set(range(len(v))) - set(chosen):
            scores[i] = w[i] * sum(max(0.0, x - c) for x, c in zip(v[i], covered))
        chosen.append(max(range(len(v)), key=lambda i: (scores[i], -i)))
        covered = [max(x, c) for x, c in zip(v[chosen[-1]], covered)]
    return chosen


def pack(codes: Tensor, levels: int) -> list:
    """Bytes of the last axis, each the number whose digits are the next codes, the lowest first."""
    if codes.ndim > 1:
        return [pack(c, levels) for c in codes]
    per, digits = int(math.log(256) / math.log(levels)), codes.tolist()
    return [
        sum(code * levels**i for i, code in enumerate(digits[first : first + per]))
        for first in range(0, len(digits), per)
    ]


def unpack(
    codes: Tensor, step: Tensor, zero: Tensor | None, centre: float, tokens: int, channels: int, index
):
    batch, heads, groups, _ = codes.shape
    rows = torch.arange(groups * tokens).expand(batch, -1) if index is None else index.long()
    out = torch.zeros(batch, heads, rows.shape[1], channels, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for j, row in enumerate(rows[b].tolist()):
                g, t = divmod(row, tokens)
                for c in range(channels):
                    at = b, h, g, t * step.shape[3] // tokens, c * step.shape[4] // channels
                    out[b, h, j, c] = (codes[b, h, g, t * channels + c].double() - centre) * step[at].double()
                    if zero is not None:
                        out[b, h, j, c] += zero[at].double()
    return out
