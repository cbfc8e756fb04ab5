"""Cache layers that hold the important tokens of a prompt in more bits than its others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import kv_compact
from ..kernels.reference import compute_dtype
from ..storage import MixedPrecision, PromptTokens
from .packed_cache import PackedLayer
from .quantised import Codes, Grouped, Rows, asymmetric
from .ragged import right_aligned


@dataclass
class Block:
    """Tokens that were packed together: keys, or values.

    Attributes:
        parts: codes of the important tokens and of the others, each a group; none of a kind that no row has.
        index: (B, n) int32, the place of each token in the parts side by side.
        share: (B, H, 1, D) by which values were divided; None for keys.
    """

    parts: list[Codes]
    index: Tensor
    share: Tensor | None = None

    @property
    def nbytes(self) -> int:
        own = [t.nbytes for t in (self.index, self.share) if t is not None]
        return sum(own) + sum(part.nbytes for part in self.parts)

    def read(self) -> Tensor:
        """(B, H, n, D)."""
        x = torch.cat([part.read() for part in self.parts], 2)
        if self.share is not None:
            x = x[:, 0].unflatten(-1, self.share.shape[1::2]).transpose(1, 2) * self.share
        return _take(x, self.index.long())

    def each(self, fn: Rows) -> Block:
        share = None if self.share is None else fn(self.share)
        return Block([part.each(fn) for part in self.parts], fn(self.index), share)


@dataclass
class Blocks:
    """Blocks of tokens, one after the other."""

    blocks: list[Block]

    @property
    def slots(self) -> int:
        return sum(block.index.shape[1] for block in self.blocks)

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def read(self) -> Tensor:
        """(B, H, n, D)."""
        return torch.cat([block.read() for block in self.blocks], 2)

    def join(self, other: Blocks) -> Blocks:
        return Blocks(self.blocks + other.blocks)

    def each(self, fn: Rows) -> Blocks:
        return Blocks([block.each(fn) for block in self.blocks])

    def first(self, slots: int) -> Blocks:
        """The first `slots` tokens; the last block that has some of them keeps its codes."""
        left: list[Block] = []
        for block in self.blocks:
            if slots > 0:
                left.append(replace(block, index=block.index[:, :slots]))
            slots -= block.index.shape[1]
        return Blocks(left)


class MixedLayer(PackedLayer):
    """A cache layer whose tokens are packed when the layer is told which of them are important.

    Attributes:
        storage: the declaration.
    """

    storage: MixedPrecision  # type: ignore[assignment]

    def announce(self, tokens: PromptTokens) -> None:
        """Which tokens are important is told by `pack`."""

    def settle(self, tokens: PromptTokens) -> None:
        """Likewise."""

    def _check_heads(self, values: Tensor) -> None:
        """Groups are whole tokens, or whole heads of one."""

    def is_due(self, coming: PromptTokens | None) -> bool:
        return False

    @torch.no_grad()
    def pack(self, important: Tensor, real: Tensor) -> None:
        """Pack all tokens that are not packed yet; `important` and `real` (B, n) bool are of the last ones.

        Tokens before these count as important.
        """
        before = self.keys.shape[2] - important.shape[1]
        important, real = (
            torch.nn.functional.pad(x.to(self.keys.device), (before, 0), value=True)
            for x in (important, real)
        )
        kinds = [right_aligned(mask & real, least=0) for mask in (important, ~important)]
        index = _places(important, kinds)
        bits = self.storage.high, self.storage.low
        self._store(
            Blocks([Block(_key_parts(self.keys, kinds, bits), index)]),
            Blocks([_value_block(self.values, real, kinds, bits, index)]),
            self.keys.shape[2],
        )


def _places(important: Tensor, kinds: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(B, n) int32: where each token is in the two kinds side by side; 0 for filler, which nothing reads."""
    place = torch.zeros(important.shape, dtype=torch.int32, device=important.device)
    first = 0
    for index, valid in kinds:
        row, column = valid.nonzero(as_tuple=True)
        place[row, index[row, column]] = (first + column).int()
        first += index.shape[1]
    return place


def _key_parts(keys: Tensor, kinds: list[tuple[Tensor, Tensor]], bits: tuple[int, int]) -> list[Codes]:
    """A scale and a zero for each channel of a kind."""
    return [
        asymmetric(Grouped.of(_take(keys, at), at.shape[1], real=valid), b)
        for (at, valid), b in zip(kinds, bits, strict=True)
        if at.shape[1]
    ]


def _value_block(
    values: Tensor, real: Tensor, kinds: list[tuple[Tensor, Tensor]], bits: tuple[int, int], index: Tensor
) -> Block:
    """Channels are divided by the root of their largest magnitude; a scale and a zero for each token."""
    wide = values.to(compute_dtype(values))
    largest = wide.abs().masked_fill(~real[:, None, :, None], 0).amax(2, keepdim=True)
    share = largest.sqrt().masked_fill(largest == 0, 1).to(values.dtype)
    # all heads side by side, as one scale serves them
    divided = (wide / share.to(wide)).transpose(1, 2).flatten(2)[:, None]
    parts = [
        asymmetric(_per_token(divided, at, valid, values.dtype), b)
        for (at, valid), b in zip(kinds, bits, strict=True)
        if at.shape[1]
    ]
    return Block(parts, index, share)


def _per_token(x: Tensor, at: Tensor, valid: Tensor, dtype: torch.dtype) -> Grouped:
    taken = _take(x, at)
    return replace(Grouped.of(taken, at.shape[1], taken.shape[-1], valid), dtype=dtype)


def _take(x: Tensor, at: Tensor) -> Tensor:
    """Tokens `at` (B, m) of (B, H, n, D)."""
    return kv_compact([x], [], at)[0][0]
