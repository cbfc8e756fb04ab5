"""TempMe (arXiv 2409.01156) in explicit steps, in float64, one video at a time, from the published formulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import oracle
from .oracle import Block


@dataclass
class Clip:
    """Tokens of one clip: x (n, C), sizes (n,), the tokens of the video that each stands for, and its place.

    Attributes:
        source: (n, F * N) 0/1.
        places: per token, the token of its own frame in whose place it is.
        prefix: tokens at the start that are no patches.
    """

    x: Tensor
    sizes: Tensor
    source: Tensor
    places: list[int]
    prefix: int

    def merged(self, keys: Tensor, count: int, x: Tensor | None = None) -> Clip:
        matching = oracle.match_split(keys.detach(), count, self.prefix)
        merged = oracle.merge(self.x if x is None else x, self.sizes, self.source, matching)
        return Clip(*merged, [self.places[i] for i in matching[0]], self.prefix)


@dataclass
class Video:
    """Clips after every block; `trace` has (tokens of a clip, clips) of each."""

    layers: list[list[Clip]] = field(default_factory=list)

    @property
    def trace(self) -> list[tuple[int, int]]:
        return [(len(clips[0].x), len(clips)) for clips in self.layers]

    def spread(self, frames: int, layer: int = -1) -> Tensor:
        """(F, N, C): every token of the video reads the token that it is part of."""
        rows = {}
        for clip in self.layers[layer]:
            for column in range(clip.source.shape[1]):
                if bool(clip.source[:, column].any()):
                    rows[column] = clip.x[int(clip.source[:, column].argmax())]
        return torch.stack([rows[i] for i in range(len(rows))]).unflatten(0, (frames, -1))


def fused(clips: Sequence[Clip]) -> Clip:
    """First the prefix tokens of all clips, then the patches of all."""

    def joined(name: str) -> Tensor:
        heads = [getattr(c, name)[: c.prefix] for c in clips]
        return torch.cat([*heads, *[getattr(c, name)[c.prefix :] for c in clips]])

    places = [p for c in clips for p in c.places[: c.prefix]] + [
        p for c in clips for p in c.places[c.prefix :]
    ]
    return Clip(joined("x"), joined("sizes"), joined("source"), places, sum(c.prefix for c in clips))


def with_positions(clips: Sequence[Clip], vectors: Tensor) -> Tensor:
    moved = [
        Clip(c.x + v, c.sizes, c.source, c.places, c.prefix) for c, v in zip(clips, vectors, strict=True)
    ]
    return fused(moved).x


def tempme(
    blocks: Sequence[Block],
    x: Tensor,
    prefix: int,
    fuse: dict[int, int],
    *,
    r: int = 2,
    cross: float = 0.3,
    intra: float = 0.1,
    prop_attn: bool = True,
    positions: Sequence[Tensor] | None = None,
    rope: Tensor | None = None,
    half: bool = False,
) -> Video:
    """One video through all blocks.

    Args:
        x: (F, N, C), what the first block reads.
        fuse: by block, the clips that it fuses.
        positions: per fusing block (clips, C).
    """
    x, (frames, n, _) = x.double(), x.shape
    every = torch.eye(frames * n, dtype=torch.float64).unflatten(0, (frames, n))
    clips = [Clip(x[i], torch.ones(n).double(), every[i], list(range(n)), prefix) for i in range(frames)]
    video, fusions, first = Video(), 0, min(fuse, default=len(blocks))
    for layer, block in enumerate(blocks):
        tokens, p = len(clips[0].x), clips[0].prefix
        if layer in fuse:
            f = fuse[layer]
            before = min(int(tokens * f * cross), (tokens - p) * f // 2)
            after = min(int((tokens * f - before) * intra), ((tokens - p) * f - before) // 2)
            groups = [clips[i : i + f] for i in range(0, len(clips), f)]
            clips = [fused(group) for group in groups]
            if before:
                moved = [c.x for c in clips]
                if positions is not None:
                    vectors = positions[fusions].double().split(f)
                    moved = [with_positions(g, v) for g, v in zip(groups, vectors, strict=True)]
                clips = [c.merged(c.x, before, m) for c, m in zip(clips, moved)]
            fusions += 1
        else:
            after = min(r if layer < first else int(tokens * intra), (tokens - p) // 2)
        clips = [_attended(block, c, after, prefix, prop_attn, rope, half) for c in clips]
        video.layers.append(clips)
    return video


def _attended(
    block: Block, c: Clip, after: int, prefix: int, prop_attn: bool, rope: Tensor | None, half: bool
) -> Clip:
    turn = None if rope is None else torch.stack([rope[place - prefix] for place in c.places[c.prefix :]])
    added, keys = oracle.attention(block, c.x, c.sizes.log() if prop_attn else None, turn, half, c.prefix)
    c = Clip(c.x + added, c.sizes, c.source, c.places, c.prefix)
    c = c.merged(keys, after) if after else c
    return Clip(c.x + oracle.mlp(block, c.x), c.sizes, c.source, c.places, c.prefix)
