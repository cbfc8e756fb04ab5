"""The masked forwards by which DiffRate's numbers of kept tokens get a gradient (arXiv 2305.17997)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters.encoders.encoder import Encoder
from .adapters.encoders.layer import EncoderLayer
from .hooks import Wrapped
from .strategies import DiffRate  # type: ignore[attr-defined]
from .strategies.common.grouping import unit
from .tokens import EncoderShape

EPSILON = 1e-6
ROUNDING = 1e-4


class KeptTokens(nn.Module):
    """A whole number of kept tokens that has a gradient.

    Args:
        patches: of an image.
        prefix: tokens that are always kept.
        step: distance between neighbouring candidates; None for the one candidate `patches`.
    """

    def __init__(self, patches: int, prefix: int, step: int | None) -> None:
        super().__init__()
        candidates = [patches] if step is None else list(range(patches, 0, -step))
        self.candidates: Tensor
        self.register_buffer("candidates", torch.tensor(candidates, dtype=torch.float32))
        self.logits = nn.Parameter(torch.zeros(len(candidates)))
        self.prefix = prefix

    def count(self) -> Tensor:
        """The kept tokens, prefix included; rounded up, with the gradient of the mean."""
        mean = (self.candidates * self.logits.softmax(0)).sum()
        # a mean that is whole but for rounding does not become the next number
        return mean + ((mean - ROUNDING).ceil() - mean).detach() + self.prefix

    def mask(self, tokens: int, alive: int) -> Tensor:
        """(tokens,) by rank: 1 for those kept, 0 for those of the first `alive` that go, 1 for the rest.

        Its gradient is that of the probability that a rank is kept.
        """
        rank = torch.arange(tokens, device=self.logits.device)
        kept = (self.candidates[None] + self.prefix > rank[:, None]).float() @ self.logits.softmax(0)
        hard = ((rank < int(self.count().detach())) | (rank >= alive)).float()
        return hard - kept.detach() + kept


@dataclass
class Search:
    """The masked forwards of one encoder.

    Tokens keep their places, so that rotary embeddings go on fitting; masks are read by a token's rank.

    Attributes:
        encoder: the encoder.
        shape: its shape.
        prune, merge: per layer the kept tokens.
        mask, sizes: (rows, n), of the tokens of the latest forward.
        owner: (rows, n) int64, the token that each one joined, -1 for a pruned one.
        tokens: how many are left.
        flops: multiply-adds of the layers in the latest forward.
    """

    encoder: Encoder
    shape: EncoderShape
    prune: list[KeptTokens]
    merge: list[KeptTokens]
    mask: Tensor = field(default_factory=lambda: torch.empty(0))
    sizes: Tensor = field(default_factory=lambda: torch.empty(0))
    owner: Tensor = field(default_factory=lambda: torch.empty(0))
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    flops: Tensor = field(default_factory=lambda: torch.empty(0))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the masked layers inside a `with` block."""
        wrapped = Wrapped()
        try:
            for i, layer in enumerate(self.encoder.layers):
                wrapped.wrap(layer.module, "forward", functools.partial(self._forward, i, layer))
            yield
        finally:
            wrapped.remove()

    def _forward(
        self, i: int, layer: EncoderLayer, original: Any, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        x = x.transpose(0, 1) if layer.transposed else x
        if i == 0:
            self._begin(x)
        heads = layer.heads(x, layer.arguments(args, kwargs))
        attention = self._attention(heads.query @ heads.key.mT * layer.scale)
        dropped = F.dropout(attention, layer.attention_dropout).to(heads.value.dtype)
        attended = (dropped @ heads.value).transpose(1, 2).flatten(2)
        x = self._compressed(i, x + layer.mixed(attended, heads), attention[:, :, 0].mean(1).detach())
        x = x + layer.mlp(x)
        x = self._spread(x) if i == len(self.prune) - 1 else x
        return x.transpose(0, 1) if layer.transposed else x

    def _begin(self, x: Tensor) -> None:
        rows, n, _ = x.shape
        if n != self.shape.patches + self.shape.prefix:
            raise ValueError(
                f"learn_rates learns for {self.shape.patches} patches, the encoder's own image size, found"
                f" {n - self.shape.prefix}: resize the images."
            )
        self.mask, self.sizes = (torch.ones(rows, n, device=x.device) for _ in range(2))
        self.owner = torch.arange(n, device=x.device).expand(rows, -1)
        self.tokens = torch.tensor(float(n))
        self.flops = torch.tensor(float(self.shape.patches * self.shape.embedding_macs))

    def _attention(self, logits: Tensor) -> Tensor:
        """(rows, heads, n, n) float32: masked tokens are seen by themselves only."""
        logits = logits.float() + self.sizes.clamp(min=EPSILON).log()[:, None, None]
        n = logits.shape[-1]
        mask, own = self.mask[:, None, None], torch.eye(n, device=logits.device)
        weight = (logits - logits.amax(-1, keepdim=True).detach()).exp() * (mask + (1 - mask) * own)
        return (weight + EPSILON / n) / (weight.sum(-1, keepdim=True) + EPSILON)

    def _compressed(self, i: int, x: Tensor, importance: Tensor) -> Tensor:
        p, (rows, n, _) = self.shape.prefix, x.shape
        # removed tokens rank last, whatever attention the epsilon leaves them
        importance = importance.masked_fill(self.mask.detach() < 0.5, -1.0)
        ranks = importance[:, p:].sort(dim=1, descending=True, stable=True).indices + p
        order = torch.cat([torch.arange(p, device=x.device).expand(rows, -1), ranks], 1)
        rank = order.argsort(1)
        before, alive, (prune, merge) = self.tokens, int(self.tokens.detach()), (self.prune[i], self.merge[i])
        after_prune, after_merge = prune.count(), merge.count()
        step = torch.arange(n, device=x.device).repeat(rows, 1)
        if (left := int(after_prune.detach())) < alive:
            self.mask = self.mask * prune.mask(n, alive)[rank]
            step, alive = step.scatter(1, order[:, left:alive], -1), left
        if (left := int(after_merge.detach())) < alive:
            sources = order[:, left:alive]
            x, targets = self._merged(x, order[:, p:left], sources)
            self.mask = self.mask * merge.mask(n, alive)[rank]
            step, alive = step.scatter(1, sources, targets), left
        self.owner = step.gather(1, self.owner.clamp(min=0)).where(self.owner >= 0, -1)
        # the published gradient of the minimum: 1 to both numbers of this layer, 0 to the layers before
        self.tokens = alive + (after_prune - after_prune.detach()) + (after_merge - after_merge.detach())
        self.flops = self.flops + before * self.shape.attention_macs + 2 * before**2 * self.shape.width
        self.flops = self.flops + self.tokens * self.shape.mlp_macs
        return x

    def _merged(self, x: Tensor, kept: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Features after the sources (rows, k) joined, and the tokens that they joined; sizes follow.

        The sources stay in place, to be masked.
        """
        alike = unit(x.detach())
        ours, theirs = (alike.gather(1, _wide(index, x)) for index in (sources, kept))
        best = (ours @ theirs.mT).max(2)
        targets = kept.gather(1, best.indices)
        count = torch.ones_like(self.sizes).scatter_add(1, targets, torch.ones_like(best.values))
        groups = x.scatter_add(1, _wide(targets, x), x.gather(1, _wide(sources, x)))
        # at least 1 while training only, as published
        moved = (self.sizes.gather(1, sources) * best.values).clamp(min=1)
        self.sizes = self.sizes.scatter_add(1, targets, moved)
        return (groups / count[..., None]).to(x), targets

    def _spread(self, x: Tensor) -> Tensor:
        """After the last layer patches read the token that they joined, pruned ones the mean of the others.

        That is what a patched encoder gives to pools and heads. The mean of the patches has the masks'
        gradient too, which is that of the published mean of a masked sequence.
        """
        p, alive = self.shape.prefix, (self.owner >= 0).float()
        out = x.gather(1, _wide(self.owner.clamp(min=0), x))
        held = torch.zeros_like(self.sizes).scatter_add(1, self.owner.clamp(min=0), alive)[:, p:, None]
        held = held / held.sum(1, keepdim=True)
        mean = (x[:, p:].float() * held).sum(1, keepdim=True)
        out = torch.where(alive[..., None] > 0, out, mean.to(x))
        masked = (x[:, p:].detach().float() * held * self.mask[:, p:, None]).sum(1, keepdim=True)
        return torch.cat([out[:, :p], out[:, p:] + (masked - masked.detach()).to(x)], 1)

    def strategy(self) -> DiffRate:
        """The present numbers."""
        extra = self.shape.prefix - 1
        prune, merge = (
            tuple(max(2, int(k.count().detach()) - extra) for k in each) for each in (self.prune, self.merge)
        )
        return DiffRate(prune=prune, merge=merge)


def _wide(index: Tensor, x: Tensor) -> Tensor:
    """An index (rows, k) of the tokens x (rows, n, C), for all channels."""
    return index[..., None].expand(-1, -1, x.shape[2])


def start_search(encoder: Encoder, step: int, whole: Sequence[int] = (0,)) -> Search:
    """A search at its start: all layers but the `whole` ones may compress."""
    patches = encoder.grid[0] * encoder.grid[1]
    shape, device = encoder.shape(patches), next(encoder.trunk.parameters()).device
    keep = {i % shape.layers for i in whole}

    def counts() -> list[KeptTokens]:
        each = range(shape.layers)
        return [KeptTokens(patches, shape.prefix, None if i in keep else step).to(device) for i in each]

    return Search(encoder, shape, counts(), counts())
