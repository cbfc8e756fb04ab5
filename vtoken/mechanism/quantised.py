"""Groups of keys and values as codes of 1, 1.6, 2 or 4 bits, with a scale and a zero per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import pack_codes, unpack_rows
from ..kernels.reference import compute_dtype

Rows = Callable[[Tensor], Tensor]  # an operation on the batch axis of a tensor


@dataclass
class Codes:
    """Packed groups of tokens, read as `(code - centre) * step + zero`.

    Attributes:
        packed: (B, H, g, w) uint8.
        step, zero: (B, H, g, s, c) in the dtype of the cache; no `zero` for 0.
        levels, centre: of the codes.
        tokens, channels: of a group.
    """

    packed: Tensor
    step: Tensor
    zero: Tensor | None
    levels: int
    centre: float
    tokens: int
    channels: int

    @property
    def slots(self) -> int:
        return self.packed.shape[2] * self.tokens

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.packed, self.step, self.zero) if t is not None)

    def read(self, index: Tensor | None = None) -> Tensor:
        """(B, H, m, channels): the tokens `index` (B, m), or all of them."""
        form = self.levels, self.centre, self.tokens, self.channels
        return unpack_rows(self.packed, self.step, self.zero, *form, index)

    def each(self, fn: Rows) -> Codes:
        zero = None if self.zero is None else fn(self.zero)
        return replace(self, packed=fn(self.packed), step=fn(self.step), zero=zero)

    def first(self, slots: int) -> Codes:
        """The groups that hold the first `slots` tokens."""
        groups = -(-slots // self.tokens)
        return self.each(lambda t: t[:, :, :groups].clone())

    def join(self, other: Codes) -> Codes:
        """These groups and then those of `other`."""
        zero = None
        if self.zero is not None and other.zero is not None:
            zero = torch.cat([self.zero, other.zero], 2)
        packed, step = torch.cat([self.packed, other.packed], 2), torch.cat([self.step, other.step], 2)
        return replace(self, packed=packed, step=step, zero=zero)


@dataclass
class Grouped:
    """Tokens to quantise, as (B, H, g, s, tokens / s, c, channels / c) in float32 or float64.

    Attributes:
        x: one scale for the numbers along axes 4 and 6.
        real: bool that broadcasts to `x`: numbers of tokens that are no filler; None if all are.
        dtype: of the scales.
    """

    x: Tensor
    real: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, group: int, per_token: int = 0, real: Tensor | None = None) -> Grouped:
        """Groups of `group` tokens of (B, H, n, D); a scale is for a channel, or `per_token` of a token.

        `real` is (B, n) bool.
        """
        rows, width = (group, per_token) if per_token else (1, 1)
        grouped = x.to(compute_dtype(x)).unflatten(3, (-1, width)).unflatten(2, (-1, rows, group // rows))
        if real is not None:
            real = real[:, None, :, None, None].unflatten(2, (-1, rows, group // rows))
        return cls(grouped, real, x.dtype)

    def mean(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        """Mean of `x` per scale over the numbers `counted` that are real; 0 where there are none."""
        masks = [m for m in (counted, self.real) if m is not None]
        if not masks:
            return x.mean((4, 6), keepdim=True)
        use = torch.stack([m.expand_as(x) for m in masks]).all(0)
        return (x * use).sum((4, 6), keepdim=True) / use.sum((4, 6), keepdim=True).clamp(min=1)

    def limits(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest real number per scale, 0 where there are none."""
        x, real = self.x, self.real
        if real is None:
            return x.amin((4, 6), keepdim=True), x.amax((4, 6), keepdim=True)
        low = x.masked_fill(~real, torch.inf).amin((4, 6), keepdim=True)
        high = x.masked_fill(~real, -torch.inf).amax((4, 6), keepdim=True)
        return low.masked_fill(low.isinf(), 0), high.masked_fill(high.isinf(), 0)

    def codes(
        self, code: Tensor, levels: int, centre: float, step: Tensor, zero: Tensor | None = None
    ) -> Codes:
        tokens, channels = code.shape[3] * code.shape[4], code.shape[5] * code.shape[6]
        packed = pack_codes(code.to(torch.uint8).flatten(3), levels)
        scales = [t[:, :, :, :, 0, :, 0].to(self.dtype) for t in (step, zero) if t is not None]
        zero = None if zero is None else scales[1]
        return Codes(packed, scales[0], zero, levels, centre, tokens, channels)


def asymmetric(grouped: Grouped, bits: int) -> Codes:
    """2^bits levels from the smallest to the largest number of a group (KIVI; VidKV eq. 4).

    Codes are those of the scale and zero as stored, so that a number is off by half a scale at most.
    """
    low, high = grouped.limits()
    levels = 2**bits
    step = ((high - low) / (levels - 1)).to(grouped.dtype).to(low.dtype)
    zero = low.to(grouped.dtype).to(low.dtype)
    code = ((grouped.x - zero) / step.clamp(min=torch.finfo(step.dtype).tiny)).round().clamp(0, levels - 1)
    return grouped.codes(code, levels, 0.0, step, zero)


def ternary(grouped: Grouped, gamma: float, scale: bool = True) -> Codes:
    """The sign of numbers larger than `gamma` times the mean magnitude, and 0 (VidKV eq. 6).

    The scale is the mean magnitude of the numbers that are not 0, which has the least squared error; without
    `scale` it is 1.
    """
    magnitude = grouped.x.abs()
    large = magnitude > gamma * grouped.mean(magnitude)
    step = grouped.mean(magnitude, large)
    return grouped.codes(grouped.x.sign() * large + 1, 3, 1.0, step if scale else torch.ones_like(step))


def signs(grouped: Grouped, zero: Tensor | None = None) -> Codes:
    """Plus or minus the mean magnitude of a group; with `zero` (channels,) half of it, plus `zero` times it.

    `zero` of one half gives 0 or the mean magnitude.
    """
    mean = grouped.mean(grouped.x.abs())
    if zero is None:
        return grouped.codes(grouped.x >= 0, 2, 0.5, 2 * mean)
    return grouped.codes(grouped.x >= 0, 2, 0.5, mean, mean * zero[:, None].to(mean))


def to_frequencies(x: Tensor) -> Tensor:
    """The Fourier coefficients of real numbers (..., m), as m real numbers: real parts, then imaginary ones.

    Those of a real signal come in conjugate pairs, of which one is left; the imaginary parts that are always
    0 are left out.
    """
    f = torch.fft.rfft(x, norm="ortho")
    return torch.cat([f.real, f.imag[..., 1 : (x.shape[-1] + 1) // 2]], -1)


def from_frequencies(x: Tensor) -> Tensor:
    """The inverse of `to_frequencies`."""
    m = x.shape[-1]
    real, imag = x.split([m // 2 + 1, (m - 1) // 2], -1)
    imag = torch.nn.functional.pad(imag, (1, real.shape[-1] - imag.shape[-1] - 1))
    return torch.fft.irfft(torch.complex(real, imag), n=m, norm="ortho")
