"""Clips of a video that layers fuse: their numbers, and trained vectors that tell them apart (TempMe)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


def default_factors(frames: int) -> tuple[int, ...]:
    """Clips that each fusing layer makes one: the primes of `frames`, the smallest multiplied to three."""
    left = frames
    factors: list[int] = []
    for prime in range(2, frames + 1):
        while left % prime == 0:
            left, factors = left // prime, [*factors, prime]
    while len(factors) > 3:
        factors = sorted([factors[0] * factors[1], *factors[2:]])
    return tuple(factors)


def clips_before(frames: int, factors: Sequence[int]) -> list[int]:
    """Clips that enter each of the layers that fuse `factors` clips: 12, 6, 3 for 12 frames and (2, 2, 3)."""
    counts = []
    for factor in factors:
        counts.append(frames)
        frames //= factor
    return counts


def zero_positions(clips: Sequence[int], width: int) -> nn.ParameterList:
    """Vectors (clips, width) per fusing layer, float32 and zero."""
    return nn.ParameterList(nn.Parameter(torch.zeros(count, width)) for count in clips)


def load_positions(path: str | Path, clips: Sequence[int]) -> nn.ParameterList:
    """Vectors from a safetensors file that `save_positions` wrote.

    Raises:
        ValueError: if there is no such file, or it holds vectors for other numbers of clips than `clips`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"frame_positions={str(path)!r} cannot be read as a safetensors file: {error}."
        ) from error
    found = [stored[name] for name in (f"layer_{i}" for i in range(len(stored))) if name in stored]
    lengths, widths = [len(v) for v in found if v.ndim == 2], {v.shape[-1] for v in found}
    if len(found) < len(stored) or lengths != list(clips) or len(widths) > 1:
        shapes = {name: tuple(v.shape) for name, v in sorted(stored.items())}
        raise ValueError(
            f"frame_positions={str(path)!r} must hold layer_0, layer_1, ... of"
            f" {', '.join(map(str, clips)) or 'no'} vectors of one width, found {shapes}:"
            " name a file that was trained with these frames and factors."
        )
    return nn.ParameterList(nn.Parameter(v) for v in found)


def save_positions(positions: nn.ParameterList | None, path: str | Path) -> None:
    """Write the vectors to a safetensors file. Raises ValueError if there are none."""
    from safetensors.torch import save_file

    if positions is None:
        raise ValueError("There are no frame positions to save: call make_frame_positions(width) and train.")
    save_file({f"layer_{i}": p.detach().cpu().contiguous() for i, p in enumerate(positions)}, str(path))


def vectors_of(positions: nn.ParameterList, index: int, shape: tuple[int, int]) -> Tensor:
    """The vectors of one fusing layer. Raises ValueError unless they are of this shape (clips, width)."""
    if index >= len(positions) or positions[index].shape != shape:
        raise ValueError(
            f"Fusing layer {index} needs frame positions of shape {shape}, found those of"
            f" {[tuple(p.shape) for p in positions]}: make or load them for this encoder, frames and fuse."
        )
    vectors: Tensor = positions[index]
    return vectors


def add_positions(x: Tensor, vectors: Tensor, count: int, prefix: int) -> Tensor:
    """Tokens of fused clips with the vector of its clip added to each.

    Args:
        x: (rows, n, C), sequences of `count` clips: the prefix tokens of all, then the patches of all; the
            sequences of a video consecutive.
        vectors: (clips of a video before they were fused, C).
        prefix: prefix tokens of a sequence.
    """
    clip = torch.arange(count, device=x.device)
    patches = x.shape[1] - prefix
    each = torch.cat([clip.repeat_interleave(prefix // count), clip.repeat_interleave(patches // count)])
    added = vectors.unflatten(0, (-1, count))[:, each]
    return x + added.repeat(len(x) // len(added), 1, 1).to(x)
