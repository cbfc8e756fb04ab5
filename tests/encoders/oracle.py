"""ToMe (arXiv 2210.09461) in explicit steps, in float64, one image at a time, from the published formulation.

Nothing here calls vtoken. Blocks are plain weights, tokens are walked through in Python loops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

INF = float("inf")


@dataclass
class Norm:
    """A layer norm."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        out = centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight.double()
        return out if self.bias is None else out + self.bias.double()


@dataclass
class Linear:
    """x @ weight.T + bias."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        out = x @ self.weight.double().T
        return out if self.bias is None else out + self.bias.double()


@dataclass
class Block:
    """The weights of a pre-norm block."""

    norm1: Norm
    q: Linear
    k: Linear
    v: Linear
    proj: Linear
    norm2: Norm
    fc1: Linear
    fc2: Linear
    heads: int
    act: str = "gelu"
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    ls1: Tensor | None = None
    ls2: Tensor | None = None


@dataclass
class Result:
    """Tokens of one image: after every block and at the end.

    Attributes:
        x: (n, C) float64 after the last block.
        sizes: (n,) float64.
        source: (n, N) 0/1, row i the original tokens that token i stands for.
        layers: per block (x, sizes, source) after it.
        order: per token, the original token whose place it has.
    """

    x: Tensor
    sizes: Tensor
    source: Tensor
    order: list[int]
    layers: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def spread(self, layer: int = -1) -> Tensor:
        """(N, C): every original token reads the token it is part of; a dropped one the mean of all patches."""
        x, _, source = self.layers[layer]
        return torch.stack([x[int(source[:, j].argmax())] for j in range(source.shape[1])])


def activation(name: str, x: Tensor) -> Tensor:
    if name == "quick_gelu":
        return x / (1 + (-1.702 * x).exp())
    if name == "gelu_tanh":
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
    assert name == "gelu", name
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def schedule(r: int | Sequence[int], layers: int, inflect: float = 0.0) -> list[int]:
    """Tokens removed per layer: a list padded with zeros, or a number with linear inflection, truncated."""
    if not isinstance(r, int):
        return [*r, *[0] * (layers - len(r))]
    if layers == 1:
        return [r]
    low = int(r * (1 - inflect))
    high = 2 * r - low
    step = (high - low) / (layers - 1)
    return [int(low + step * i) for i in range(layers)]


def cosines(a: Tensor, b: Tensor) -> Tensor:
    a = a / a.norm(dim=1, keepdim=True).clamp(min=1e-12)
    b = b / b.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return a @ b.T


Matching = tuple[list[int], dict[int, int]]  # tokens of the result in their order; source -> destination


def match_masked(keys: Tensor, r: int, cls: bool, distill: bool) -> Matching:
    """The published matching: even positions, odd positions, protected ones masked with -inf."""
    n = len(keys)
    r = min(r, (n - cls - distill) // 2)
    if r <= 0:
        return list(range(n)), {}
    a, b = list(range(0, n, 2)), list(range(1, n, 2))
    scores = cosines(keys[a], keys[b])
    if cls:
        scores[0, :] = -INF
    if distill:
        scores[:, 0] = -INF
    best, to = [], []
    for i in range(len(a)):
        row = scores[i].tolist()
        best.append(max(row))
        to.append(row.index(max(row)))
    falling = sorted(range(len(a)), key=lambda i: -best[i])  # stable
    sources, rest = falling[:r], falling[r:]
    if cls:
        rest = sorted(rest)
    stay = [a[i] for i in rest]
    order = [stay[0], b[0], *stay[1:], *b[1:]] if distill else [*stay, *b]
    return order, {a[i]: b[to[i]] for i in sources}


def match_split(keys: Tensor, r: int, prefix: int, sort: bool = True) -> Matching:
    """The same with the prefix taken off: patches at even positions of the whole sequence, and at odd ones."""
    n = len(keys)
    r = min(r, (n - prefix) // 2)
    if r <= 0:
        return list(range(n)), {}
    a = [i for i in range(prefix, n) if i % 2 == 0]
    b = [i for i in range(prefix, n) if i % 2 == 1]
    scores = cosines(keys[a], keys[b]).tolist()
    to = {i: b[row.index(max(row))] for i, row in zip(a, scores)}
    best = {i: max(row) for i, row in zip(a, scores)}
    falling = sorted(a, key=lambda i: -best[i])
    rest = sorted(falling[r:]) if sort else falling[r:]
    return [*range(prefix), *rest, *b], {i: to[i] for i in falling[:r]}


def match_kth(keys: Tensor, k: int, prefix: int = 0) -> Matching:
    """Groups of k: the last token of each is a destination, all others are sources, the rest is dropped."""
    n = prefix + (len(keys) - prefix) // k * k
    b = [i for i in range(prefix, n) if (i - prefix) % k == k - 1]
    a = [i for i in range(prefix, n) if (i - prefix) % k != k - 1]
    scores = cosines(keys[a], keys[b]).tolist()
    return [*range(prefix), *b], {i: b[row.index(max(row))] for i, row in zip(a, scores)}


def match(keys: Tensor, r: int, prefix: int, sort: bool) -> Matching:
    """Of 1 and 2 prefix tokens the published matching, of more the split one."""
    if prefix in (1, 2):
        return match_masked(keys, r, True, prefix == 2)
    return match_split(keys, r, prefix, sort)


def merge(x: Tensor, sizes: Tensor, source: Tensor, matching: Matching) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the groups: of s * x and of s, and the greatest membership."""
    order, joins = matching
    rows, size, member = [], [], []
    for i in order:
        group = [i, *[a for a, b in joins.items() if b == i]]
        total = sum(sizes[j] for j in group)
        rows.append(sum(sizes[j] * x[j] for j in group) / total)
        size.append(total)
        member.append(source[group].amax(0))
    return torch.stack(rows), torch.stack(size), torch.stack(member)


def rotated(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """(n, d) with channel pairs turned by the angles of (n, 2d) sines and cosines, pair by pair."""
    d = x.shape[1]
    sin, cos = rope[:, :d].double(), rope[:, d:].double()
    pairs = [(c, c + d // 2) for c in range(d // 2)] if half else [(c, c + 1) for c in range(0, d, 2)]
    columns: list[Tensor] = [x[:, 0]] * d
    for c, e in pairs:
        columns[c] = x[:, c] * cos[:, c] - x[:, e] * sin[:, c]
        columns[e] = x[:, e] * cos[:, e] + x[:, c] * sin[:, e]
    return torch.stack(columns, 1)


def attention(
    block: Block,
    x: Tensor,
    bias: Tensor | None,
    rope: Tensor | None = None,
    half: bool = False,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """What attention adds, (n, C), and the keys before rotation, the mean over heads.

    Args:
        bias: (n,) added to the logits of every key.
        rope: (n - first, 2 * head_dim) for the tokens after the first ones.
    """
    h = block.norm1(x)
    q, k, v = block.q(h), block.k(h), block.v(h)
    d = q.shape[1] // block.heads
    outputs, keys = [], []
    for i in range(block.heads):
        part = slice(i * d, i * d + d)
        qi, ki, vi = q[:, part], k[:, part], v[:, part]
        qi = qi if block.q_norm is None else block.q_norm(qi)
        ki = ki if block.k_norm is None else block.k_norm(ki)
        keys.append(ki)
        if rope is not None:
            qi = torch.cat([qi[:first], rotated(qi[first:], rope, half)])
            ki = torch.cat([ki[:first], rotated(ki[first:], rope, half)])
        logits = qi @ ki.T / math.sqrt(d)
        if bias is not None:
            logits = logits + bias[None, :]
        outputs.append(logits.softmax(1) @ vi)
    out = block.proj(torch.cat(outputs, 1))
    return out if block.ls1 is None else out * block.ls1.double(), torch.stack(keys).mean(0)


def mlp(block: Block, x: Tensor) -> Tensor:
    out = block.fc2(activation(block.act, block.fc1(block.norm2(x))))
    return out if block.ls2 is None else out * block.ls2.double()


def tome(
    blocks: Sequence[Block],
    x: Tensor,
    r: Sequence[int],
    prefix: int,
    *,
    prop_attn: bool = True,
    sort: bool = True,
    kth: dict[int, int] | None = None,
    rope: Tensor | None = None,
    half: bool = False,
) -> Result:
    """One image through all blocks.

    Args:
        x: (N, C), the residual stream that the first block reads.
        r: tokens that each block removes.
        kth: by block, the group size of the kth matching.
        rope: (N - prefix, 2 * head_dim), sines and cosines of the patches' places.
    """
    x = x.double()
    n = len(x)
    sizes, source = torch.ones(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    order, layers = list(range(n)), []
    for i, block in enumerate(blocks):
        turn = None if rope is None else torch.stack([rope[j - prefix] for j in order[prefix:]])
        bias = sizes.log() if prop_attn else None
        added, keys = attention(block, x, bias, turn, half, prefix)
        x = x + added
        groups = (kth or {}).get(i)
        if groups or r[i]:
            with torch.no_grad():
                keys = keys.detach()
                matching = match_kth(keys, groups, prefix) if groups else match(keys, r[i], prefix, sort)
            x, sizes, source = merge(x, sizes, source, matching)
            order = [order[j] for j in matching[0]]
        x = x + mlp(block, x)
        layers.append((x, sizes, source))
    return Result(x, sizes, source, order, layers)


def mean_pool(x: Tensor, sizes: Tensor, first: int) -> Tensor:
    """(C,) the mean of the tokens after the first ones, weighted by sizes."""
    return sum(sizes[i] * x[i] for i in range(first, len(x))) / sizes[first:].sum()


def attention_pool(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, heads: int) -> Tensor:
    """(queries, C): projected queries read projected keys and values, log sizes on the keys' logits."""
    d = q.shape[1] // heads
    out = []
    for i in range(heads):
        part = slice(i * d, i * d + d)
        logits = q[:, part] @ k[:, part].T / math.sqrt(d) + sizes.log()[None, :]
        out.append(logits.softmax(1) @ v[:, part])
    return torch.cat(out, 1)
