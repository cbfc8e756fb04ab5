"""The packed part of one cache layer: keys with hard and easy channels, values with protected tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import kv_compact
from ..storage import Packed
from .quantised import Codes, Grouped, Rows, asymmetric, from_frequencies, signs, ternary, to_frequencies

FEWEST_HARD = 32  # channels that have 2 bits, where there are some


def split_channels(keys: Tensor, real: Tensor | None, count: int) -> Tensor:
    """(B, D) int64: the `count` channels of the largest range over heads and real tokens, then the others.

    Both are in ascending order, as the neighbours of an easy channel matter to its Fourier transform.
    """
    low, high = keys.amin(1), keys.amax(1)
    if real is not None:
        low = low.masked_fill(~real[..., None], torch.inf)
        high = high.masked_fill(~real[..., None], -torch.inf)
    order = torch.argsort(high.amax(1) - low.amin(1), dim=-1, descending=True, stable=True)
    return torch.cat([part.sort(-1).values for part in order.tensor_split([count], -1)], -1)


@dataclass
class PackedKeys:
    """Keys of whole groups of tokens.

    Attributes:
        hard, easy: channels of 2 or 4 bits, and those of 1 bit as Fourier coefficients along the channels.
        channels: (B, D) int16, the channels of `hard` and then those of `easy`; None if all are hard.
        index: (B, n) int32, the place of each token that is left after a crop; None for all in order.
    """

    hard: Codes | None
    easy: Codes | None
    channels: Tensor | None = None
    index: Tensor | None = None

    @classmethod
    def of(cls, keys: Tensor, real: Tensor | None, form: Packed, channels: Tensor | None) -> PackedKeys:
        """Pack (B, H, n, D), with the channels of an earlier block if there is one."""
        if form.key_bits >= 2:
            return cls(asymmetric(Grouped.of(keys, form.group, real=real), int(form.key_bits)), None)
        width = keys.shape[-1]
        count = int(width * (form.key_bits - 1))
        if form.key_bits > 1 and not count:
            count = min(FEWEST_HARD, width)
        if channels is None:
            channels = split_channels(keys, real, count).to(torch.int16)
        order = channels.long()[:, None, None].expand_as(keys)
        hard, easy = keys.gather(-1, order).split([count, width - count], -1)
        zero = None
        if not form.sign and easy.shape[-1]:
            # the imaginary parts of a conjugate pair are read as 0 and s: s / 2 and -s / 2 in the real signal
            zero = torch.zeros(easy.shape[-1], device=keys.device)
            zero[: easy.shape[-1] // 2 + 1] = 0.5
        return cls(
            asymmetric(Grouped.of(hard, form.group, real=real), 2) if count else None,
            signs(_frequencies(easy, form.group, real), zero) if count < width else None,
            channels,
        )

    @property
    def slots(self) -> int:
        return self.index.shape[1] if self.index is not None else self._parts()[0].slots

    @property
    def nbytes(self) -> int:
        own = [t.nbytes for t in (self.channels, self.index) if t is not None]
        return sum(own) + sum(part.nbytes for part in self._parts())

    def _parts(self) -> list[Codes]:
        return [part for part in (self.hard, self.easy) if part is not None]

    def read(self) -> Tensor:
        """(B, H, n, D)."""
        index, parts = self.index, []
        if self.hard is not None:
            parts.append(self.hard.read(index))
        if self.easy is not None:
            easy = self.easy.read(index)
            wide = torch.promote_types(easy.dtype, torch.float32)
            parts.append(from_frequencies(easy.to(wide)).to(easy.dtype))
        keys = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if self.channels is None:
            return keys
        return keys.gather(-1, self.channels.argsort(-1)[:, None, None].expand_as(keys))

    def join(self, other: PackedKeys) -> PackedKeys:
        hard, easy = (
            None if a is None or b is None else a.join(b)
            for a, b in ((self.hard, other.hard), (self.easy, other.easy))
        )
        return PackedKeys(hard, easy, self.channels, _followed(self.index, self._parts()[0], other.slots))

    def each(self, fn: Rows) -> PackedKeys:
        hard, easy = (None if part is None else part.each(fn) for part in (self.hard, self.easy))
        channels, index = (None if t is None else fn(t) for t in (self.channels, self.index))
        return PackedKeys(hard, easy, channels, index)

    def first(self, slots: int) -> PackedKeys:
        """The first `slots` tokens, not fewer than 1."""
        index = _cut(self.index, self._parts()[0], slots)
        last = int(index.max()) + 1
        hard, easy = (None if part is None else part.first(last) for part in (self.hard, self.easy))
        return PackedKeys(hard, easy, self.channels, index)


def _frequencies(easy: Tensor, group: int, real: Tensor | None) -> Grouped:
    wide = easy.to(torch.promote_types(easy.dtype, torch.float32))
    return replace(Grouped.of(to_frequencies(wide), group, real=real), dtype=easy.dtype)


def _cut(index: Tensor | None, codes: Codes, slots: int) -> Tensor:
    if index is None:
        index = torch.arange(codes.slots, dtype=torch.int32, device=codes.packed.device)
        index = index.expand(codes.packed.shape[0], -1)
    return index[:, :slots].contiguous()


def _followed(index: Tensor | None, codes: Codes, more: int) -> Tensor | None:
    """The index of `codes`, followed by so many tokens of later groups."""
    if index is None:
        return None
    new = torch.arange(codes.slots, codes.slots + more, dtype=index.dtype, device=index.device)
    return torch.cat([index, new.expand(index.shape[0], more)], 1)


@dataclass
class PackedValues:
    """Values of whole groups of tokens.

    Attributes:
        low: all tokens, or those that are not protected.
        high: the protected tokens, None if there never were any.
        index: (B, n) int32, the place of each token in `low`, or -1 - its place in `high`; None for all in
            order.
    """

    low: Codes
    high: Codes | None = None
    index: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, real: Tensor | None, form: Packed, protected: Tensor | None) -> PackedValues:
        """Pack (B, H, n, D); of the `protected` tokens (B, n) bool every row has whole groups."""
        count = None if protected is None else protected.sum(1)
        most = 0 if count is None else int(count.max())
        if protected is None or count is None or not most:
            return cls(_packed_values(values, real, form, form.value_bits))
        n = values.shape[2]
        # rows with fewer tokens of a kind are filled with whole groups of the other, which nothing reads
        order = torch.argsort(protected.to(torch.int8), dim=1, stable=True)
        low, high = order[:, : max(form.group, n - int(count.min()))], order[:, n - most :]
        low_place, high_place = (~protected).cumsum(1) - 1, protected.cumsum(1) - 1 + (most - count)[:, None]
        return cls(
            _packed_values(*_take(values, real, low), form, form.value_bits),
            _packed_values(*_take(values, real, high), form, 2),
            torch.where(protected, -1 - high_place, low_place).to(torch.int32),
        )

    @property
    def slots(self) -> int:
        return self.low.slots if self.index is None else self.index.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.low, self.high, self.index) if part is not None)

    def read(self) -> Tensor:
        """(B, H, n, D)."""
        if self.index is None:
            return self.low.read()
        low = self.low.read(self.index.clamp(min=0))
        if self.high is None:
            return low
        high = self.high.read((-1 - self.index).clamp(min=0))
        return torch.where((self.index < 0)[:, None, :, None], high, low)

    def join(self, other: PackedValues) -> PackedValues:
        low, high, index = self.low.join(other.low), self.high or other.high, None
        if self.high is not None and other.high is not None:
            high = self.high.join(other.high)
        if self.index is not None or other.index is not None:
            new = other.index if other.index is not None else _cut(None, other.low, other.slots)
            before = 0 if self.high is None else self.high.slots
            new = torch.where(new < 0, new - before, new + self.low.slots)
            index = torch.cat([_cut(self.index, self.low, self.slots), new], 1)
        return PackedValues(low, high, index)

    def each(self, fn: Rows) -> PackedValues:
        high = None if self.high is None else self.high.each(fn)
        return PackedValues(self.low.each(fn), high, None if self.index is None else fn(self.index))

    def first(self, slots: int) -> PackedValues:
        """The first `slots` tokens, not fewer than 1."""
        index = _cut(self.index, self.low, slots)
        last, last_high = max(0, int(index.max())) + 1, -int(index.min())
        high = None if self.high is None or last_high <= 0 else self.high.first(last_high)
        return PackedValues(self.low.first(last), high, index)


def _packed_values(values: Tensor, real: Tensor | None, form: Packed, bits: float) -> Codes:
    per_token = form.group if form.value_groups == "token" else 0
    grouped = Grouped.of(values, form.group, per_token, real)
    return ternary(grouped, form.gamma, form.scale) if bits < 2 else asymmetric(grouped, int(bits))


def _take(x: Tensor, real: Tensor | None, at: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens `at` (B, m) of (B, H, n, D) and of (B, n)."""
    return kv_compact([x], [], at)[0][0], None if real is None else real.gather(1, at)


def protected_tokens(scores: Tensor, visual: Tensor, share: float, group: int) -> Tensor:
    """(B, n) bool: of `visual` tokens (B, n) the share with the largest `scores`, in whole groups.

    One group at least, of a row that has so many visual tokens.
    """
    count = visual.sum(1)
    wanted = ((count * share).long() // group).clamp(min=1).minimum(count // group) * group
    rank = torch.argsort(
        scores.masked_fill(~visual, -torch.inf), dim=1, descending=True, stable=True
    ).argsort(1)
    return (rank < wanted[:, None]) & visual
