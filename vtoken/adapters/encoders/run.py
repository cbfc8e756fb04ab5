"""One forward of an encoder whose sequence becomes shorter from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels import gather_merge
from ...selection import EncoderMerge
from ...tokens import EncoderShape


@dataclass
class EncoderRun:
    """State of one forward.

    Attributes:
        shape: the encoder and its input.
        plan: what the strategy answered to `encoder_plan(shape)`.
        rows: sequences of the batch at present.
        tokens: tokens of a sequence at present, prefix included.
        prefix: of these the first ones, which are no patches (class token, registers).
        fused: images in one sequence; 1 unless neighbouring sequences were fused.
        layer: the next layer.
        ends: layers that this forward has.
        sizes: (rows, tokens) float32, patches that each token stands for; None while all are 1.
        kept: (rows, tokens) int64, the token of its own image whose place each token takes; None before the
            first change.
        work: per layer that ran its sequences, the tokens of one that attend and that pass the MLP, and how
            many of these are no patches.
        marks: the start and the end, as `Stopwatch.mark` gives them.
    """

    shape: EncoderShape
    plan: Any
    rows: int
    tokens: int
    prefix: int
    fused: int = 1
    layer: int = 0
    ends: int = 0
    sizes: Tensor | None = None
    kept: Tensor | None = None
    work: list[tuple[int, int, int, int]] = field(default_factory=list)
    marks: list[Any] = field(default_factory=list)
    _steps: list[tuple[int, Tensor | tuple[int, int, int]]] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Images of the batch."""
        return self.rows * self.fused

    def continues(self, layer: int, x: Tensor) -> bool:
        """Whether a layer that is called on x (rows, n, C) is the next one of this forward."""
        rows, tokens = x.shape[:2]
        return layer == self.layer < self.ends and rows == self.rows and tokens == self.tokens

    @property
    def changed(self) -> bool:
        """Whether a token was merged, dropped or moved."""
        return bool(self._steps)

    def prefix_after(self, layer: int) -> int:
        """Tokens of a sequence after a layer that are no patches."""
        return self.work[layer][3]

    def bias(self) -> Tensor | None:
        """(rows, tokens) float32, the logarithms of the sizes; None while all are 1."""
        return None if self.sizes is None else self.sizes.clamp(min=1e-6).log()

    def ones(self, x: Tensor) -> Tensor:
        """The sizes, made if all are 1; float64 beside tokens of float64."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_ones(self.rows, self.tokens, dtype=dtype) if self.sizes is None else self.sizes

    def _kept(self, device: torch.device) -> Tensor:
        """`kept`, made if nothing was merged."""
        return (
            torch.arange(self.tokens, device=device).expand(self.rows, -1) if self.kept is None else self.kept
        )

    def fuse(self, x: Tensor, count: int) -> Tensor:
        """Make one sequence of `count` neighbouring ones: all their prefix tokens, then all their patches.

        Args:
            x: (rows, tokens, C).

        Returns:
            (rows / count, count * tokens, C).
        """
        before = (count, self.prefix, self.tokens)
        index = _fused_order(*before, x.device)
        places = self._kept(x.device).unflatten(0, (-1, count)).flatten(1, 2)
        self.kept = places[:, index]
        x = x.unflatten(0, (-1, count)).flatten(1, 2)[:, index]
        if self.sizes is not None:
            self.sizes = self.sizes.unflatten(0, (-1, count)).flatten(1, 2)[:, index]
        self.rows, self.tokens = self.rows // count, self.tokens * count
        self.prefix, self.fused = self.prefix * count, self.fused * count
        self._steps.append((self.layer, before))
        return x

    def merge(self, x: Tensor, merge: EncoderMerge) -> Tensor:
        """Tokens (rows, n, C) after a merge, (rows, m, C); sizes and places follow."""
        sizes = self.ones(x)
        self.sizes = merge.sizes_of(sizes) if merge.sizes is None else merge.sizes
        self.kept = merge.keep if self.kept is None else self.kept.gather(1, merge.keep)
        self.tokens = merge.keep.shape[1]
        self._steps.append((self.layer, merge.into))
        return gather_merge(x, merge.keep, merge.into, merge.weight)

    def owner(self, layer: int | None = None) -> Tensor | None:
        """The token that every token of the input ended up in, prefix included.

        Args:
            layer: after which layer; after the last that ran if None.

        Returns:
            (rows, fused * n) int64, -1 for a token that was dropped; n tokens of every image in their
            original order. None if nothing was merged, dropped or moved by then.
        """
        steps = [s for at, s in self._steps if layer is None or at <= layer]
        if not steps or self.kept is None:
            return None
        n = self.shape.patches + self.shape.prefix
        rows = self.images
        owner = torch.arange(n, device=self.kept.device).expand(rows, -1)
        for step in steps:
            if isinstance(step, Tensor):
                owner = step.gather(1, owner.clamp(min=0)).where(owner >= 0, -1)
            else:
                count, prefix, tokens = step
                place = torch.empty(count * tokens, dtype=torch.long, device=owner.device)
                order = _fused_order(count, prefix, tokens, owner.device)
                place[order] = torch.arange(count * tokens, device=owner.device)
                each = owner.unflatten(0, (-1, count))
                shifted = each + tokens * torch.arange(count, device=owner.device)[:, None]
                owner = place[shifted.clamp(min=0)].where(each >= 0, -1).flatten(1)
        return owner

    def places(self) -> Tensor:
        """(images, patches) int64: the patch in whose place each patch's token stands, -1 if dropped."""
        owner, first = self.owner(), self.shape.prefix
        if owner is None or self.kept is None:
            return torch.arange(self.shape.patches).expand(self.rows, -1)
        place = self.kept.gather(1, owner.clamp(min=0)).where(owner >= 0, -1)[:, first:]
        return (place - first).clamp(min=-1)

    def patch_owners(self) -> Tensor | None:
        """(rows, fused, patches) int64, the last layer's token in which each patch ended, -1 for none."""
        owner = self.owner()
        return None if owner is None else owner.unflatten(1, (self.fused, -1))[..., self.shape.prefix :]

    def per_patch(self, value: Tensor) -> Tensor:
        """Values of the patch tokens at present (rows, ..., tokens - prefix) -> of all patches."""
        owner = self.owner()
        if owner is None:
            return value
        index = (owner[:, self.shape.prefix :] - self.prefix).clamp(min=0)
        index = index.view(len(index), *[1] * (value.ndim - 2), -1)
        return value.gather(-1, index.expand(*value.shape[:-1], -1))

    def spread(self, x: Tensor, layer: int | None = None) -> Tensor:
        """Tokens of a layer as the unpatched encoder has them: every patch reads the token that it joined.

        A patch that was dropped reads the mean of those that are left, weighted by their sizes.

        Args:
            x: (rows, m, C) after that layer, or (rows, m).

        Returns:
            (images, n, C) or (images, n).
        """
        owner = self.owner(layer)
        if owner is None:
            return x
        flat = x[..., None] if x.ndim == 2 else x
        out = flat.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, flat.shape[2]))
        if self.shape.drops:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            weight = flat.new_zeros(flat.shape[:2], dtype=wide)
            alive = (owner >= 0).to(wide)
            weight = weight.scatter_add(1, owner.clamp(min=0), alive)[..., None]
            weight[:, : out.shape[1] // (self.shape.patches + self.shape.prefix) * self.shape.prefix] = 0
            mean = (flat.to(wide) * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
            out = torch.where((owner >= 0)[..., None], out, mean.to(out))
        out = out.reshape(-1, self.shape.patches + self.shape.prefix, flat.shape[2])
        return out[..., 0] if x.ndim == 2 else out

    def spread_by_count(self, x: Tensor) -> Tensor:
        """`spread` of the output of the layer that left as many tokens; x itself if it has all of them."""
        lengths = {feed: layer for layer, (_, _, feed, _) in reversed(list(enumerate(self.work)))}
        n = self.shape.patches + self.shape.prefix
        return x if x.shape[1] == n or x.shape[1] not in lengths else self.spread(x, lengths[x.shape[1]])


def _fused_order(count: int, prefix: int, tokens: int, device: torch.device) -> Tensor:
    """(count * tokens,) int64: of `count` sequences side by side all prefix tokens, then all patches."""
    every = torch.arange(count * tokens, device=device).view(count, tokens)
    return torch.cat([every[:, :prefix].flatten(), every[:, prefix:].flatten()])
