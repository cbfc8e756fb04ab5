"""Triton kernels that select tokens: nearest tokens, farthest points and greedy MAP, each in one launch.

The greedy loops run inside the kernel. The programs of one sample own its rows and agree on every pick
through a barrier in global memory, so all of them must be on the device together: a cooperative launch
guarantees it or fails.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference_select
from ..reference_select import DPP_FLOOR, DPP_TIE, TIE, first_max, match_tensors, parity_split
from .common import last_contiguous, multiprocessors, on_device, wide

COOPERATIVE = True  # False: one launch a step, for devices without cooperative launch
_TIE, _DPP_TIE, _DPP_FLOOR = tl.constexpr(TIE), tl.constexpr(DPP_TIE), tl.constexpr(DPP_FLOOR)


@triton.jit(do_not_specialize=["first_a", "first_b", "count_a", "count_b", "n"])
def _most_similar(
    x, inverse, best, partner, first_a, first_b, step, count_a, count_b, n, d, x_batch, x_row,
    WIDE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Highest cosine of each token first_a + i * step with another token first_b + j * step, and that j."""
    batch = tl.program_id(1).to(tl.int64)
    x, inverse = x + batch * x_batch, inverse + batch * n
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    at_a = first_a + a * step
    norm_a = tl.load(inverse + at_a, mask=a < count_a, other=0.0)
    high = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    found = tl.zeros((BLOCK_A,), tl.int32)
    for first in range(0, count_b, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        at_b = first_b + b * step
        dots = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        for channel in range(0, d, BLOCK_D):
            cols = channel + tl.arange(0, BLOCK_D)
            rows_a = tl.load(
                x + at_a.to(tl.int64)[:, None] * x_row + cols[None, :],
                mask=(a < count_a)[:, None] & (cols < d)[None, :], other=0.0,
            )  # fmt: skip
            rows_b = tl.load(
                x + at_b.to(tl.int64)[None, :] * x_row + cols[:, None],
                mask=(b < count_b)[None, :] & (cols < d)[:, None], other=0.0,
            )  # fmt: skip
            if WIDE:
                rows_a, rows_b = rows_a.to(tl.float32), rows_b.to(tl.float32)
            dots = tl.dot(rows_a, rows_b, dots, input_precision="ieee")
        cosine = dots * norm_a[:, None] * tl.load(inverse + at_b, mask=b < count_b, other=0.0)[None, :]
        other = (b < count_b)[None, :] & (at_a[:, None] != at_b[None, :])
        cosine = tl.where(other, cosine, float("-inf"))
        here = tl.max(cosine, 1)
        where = tl.min(tl.where(cosine >= here[:, None] - _TIE, b[None, :], count_b), 1)
        found = tl.where(here > high + _TIE, where, found)
        high = tl.maximum(high, here)
    tl.store(best + batch * count_a + a, high, mask=a < count_a)
    tl.store(partner + batch * count_a + a, found, mask=a < count_a)


def _inverse_norm(x: Tensor) -> Tensor:
    return (
        torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp_min_(1e-12).reciprocal_().contiguous()
    )


def _search(x: Tensor, inverse: Tensor, first_a: int, first_b: int, step: int) -> tuple[Tensor, Tensor]:
    batch, n, d = x.shape
    count_a, count_b = len(range(first_a, n, step)), len(range(first_b, n, step))
    best = torch.empty(batch, count_a, dtype=torch.float32, device=x.device)
    partner = torch.empty(batch, count_a, dtype=torch.long, device=x.device)
    with on_device(x):
        _most_similar[(triton.cdiv(count_a, 64), batch)](
            x, inverse, best, partner, first_a, first_b, step, count_a, count_b, n, d,
            x.stride(0), x.stride(1),
            WIDE=wide(x), BLOCK_A=64, BLOCK_B=64, BLOCK_D=32 if x.dtype == torch.float32 else 64,
        )  # fmt: skip
    return best, partner


def bipartite_match(keys: Tensor, r: int, protect: int = 0, sort: bool = True) -> list[Tensor]:
    batch, n, d = keys.shape
    r = max(0, min(r, (n - protect) // 2))
    if not min(batch, r, d):
        return reference_select.bipartite_match(keys, r, protect, sort)
    keys = last_contiguous(keys)
    best, partner = _search(keys, _inverse_norm(keys), *parity_split(n, protect), 2)
    return match_tensors(best, partner, n, r, protect, sort)


@triton.jit
def _meet(arrived, expected, PROGRAMS: tl.constexpr):
    """Barrier of the programs of one sample; writes before it can be read after it."""
    tl.debug_barrier()
    if PROGRAMS > 1:
        tl.atomic_add(arrived, 1, sem="acq_rel")
        while tl.atomic_add(arrived, 0, sem="acquire") < expected:
            pass
        tl.debug_barrier()


@triton.jit
def _dot_with(x, rows, inside, pick, d, x_row, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dot products of some rows with row `pick`; equal rows give equal bits."""
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, d, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        chosen = tl.load(x + pick.to(tl.int64) * x_row + cols, mask=cols < d, other=0.0).to(tl.float32)
        at = x + rows.to(tl.int64)[:, None] * x_row + cols[None, :]
        total += (
            tl.load(at, mask=inside[:, None] & (cols < d)[None, :], other=0.0).to(tl.float32)
            * chosen[None, :]
        )
    return tl.sum(total, 1)


@triton.jit
def _agree(slots, places, n, PROGRAMS: tl.constexpr, BLOCK_P: tl.constexpr, slack_rel, slack_abs):
    """The lowest place whose value is within the slack of the highest value of the programs."""
    program = tl.arange(0, BLOCK_P)
    value = tl.load(slots + program, mask=program < PROGRAMS, other=float("-inf"), volatile=True)
    place = tl.load(places + program, mask=program < PROGRAMS, other=n, volatile=True)
    high = tl.max(value, 0)
    agreed = tl.min(tl.where(value >= high - slack_abs - high * slack_rel, place, n), 0)
    return tl.minimum(agreed, n - 1)  # of values that are not numbers none is the highest


@triton.jit(do_not_specialize=["first_step", "last_step", "n", "k", "share"])
def _farthest(
    x, inverse, start, out, score, slots, places, arrived, first_step, last_step, n, k, d, share,
    x_batch, x_row,
    PROGRAMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """score: minus the cosine with the nearest chosen token, -inf for chosen tokens."""
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x, inverse, score = x + batch * x_batch, inverse + batch * n, score + batch * n
    slots, places = slots + batch * 2 * PROGRAMS, places + batch * 2 * PROGRAMS
    for t in range(first_step, last_step):
        before, now = (t + 1) % 2 * PROGRAMS, t % 2 * PROGRAMS
        if t == 0:
            pick = tl.load(start + batch).to(tl.int32)
        else:
            pick = _agree(slots + before, places + before, n, PROGRAMS, BLOCK_P, 0.0, _TIE)
        if program == 0:
            tl.store(out + batch * k + t, pick.to(tl.int64))
        norm = tl.load(inverse + pick)
        high, place = float("-inf"), n
        for first in range(program * share, tl.minimum((program + 1) * share, n), BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            inside = (rows < n) & (rows < (program + 1) * share)
            dots = _dot_with(x, rows, inside, pick, d, x_row, BLOCK_N, BLOCK_D)
            value = -dots * tl.load(inverse + rows, mask=inside, other=0.0) * norm
            value = tl.minimum(value, tl.load(score + rows, mask=inside, other=float("-inf")))
            value = tl.where(rows == pick, float("-inf"), value)
            tl.store(score + rows, value, mask=inside)
            here = tl.max(value, 0)
            where = tl.min(tl.where(inside & (value >= here - _TIE), rows, n), 0)
            place = tl.where((here > high + _TIE) | (place == n), where, place)
            high = tl.maximum(high, here)
        tl.store(slots + now + program, high)
        tl.store(places + now + program, place)
        if t + 1 < last_step:
            _meet(arrived + batch, (t - first_step + 1) * PROGRAMS, PROGRAMS)


@triton.jit(do_not_specialize=["first_step", "last_step", "n", "k", "share"])
def _greedy(
    x, inverse, quality, start, out, left, factor, slots, places, gains, arrived,
    first_step, last_step, n, k, d, share, x_batch, x_row,
    PROGRAMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """left: variance of each token that the chosen ones do not explain, -inf for chosen tokens."""
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x, inverse, quality, left = (
        x + batch * x_batch,
        inverse + batch * n,
        quality + batch * n,
        left + batch * n,
    )
    factor = factor + batch * k * n
    slots, places = slots + batch * 2 * PROGRAMS, places + batch * 2 * PROGRAMS
    gains = gains + batch * 2 * PROGRAMS
    for t in range(first_step, last_step):
        before, now = (t + 1) % 2 * PROGRAMS, t % 2 * PROGRAMS
        if t == 0:
            pick = tl.load(start + batch).to(tl.int32)
            strength = tl.load(quality + pick)
            gain = strength * strength
        else:
            pick = _agree(slots + before, places + before, n, PROGRAMS, BLOCK_P, _DPP_TIE, 0.0)
            gain = tl.load(gains + before + pick // share, volatile=True)
            strength = tl.load(quality + pick)
        if program == 0:
            tl.store(out + batch * k + t, pick.to(tl.int64))
        strength *= tl.load(inverse + pick)
        root = tl.sqrt(tl.maximum(gain, 1e-30))
        high, place, high_gain = float("-inf"), n, 0.0
        for first in range(program * share, tl.minimum((program + 1) * share, n), BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            inside = (rows < n) & (rows < (program + 1) * share)
            q = tl.load(quality + rows, mask=inside, other=0.0)
            row = _dot_with(x, rows, inside, pick, d, x_row, BLOCK_N, BLOCK_D)
            row *= tl.load(inverse + rows, mask=inside, other=0.0) * q * strength
            for s in range(0, t, BLOCK_T):
                step = s + tl.arange(0, BLOCK_T)
                at = factor + step[:, None] * n
                along = tl.load(at + pick, mask=(step < t)[:, None], other=0.0, volatile=True)
                mine = tl.load(at + rows[None, :], mask=(step < t)[:, None] & inside[None, :], other=0.0)
                row -= tl.sum(along * mine, 0)
            row /= root
            rest = tl.load(left + rows, mask=inside, other=float("-inf"))
            # as in the reference: a covariance is at most the root of both variances
            bound = tl.sqrt(tl.where(rest == float("-inf"), 0.0, tl.maximum(rest, q * q * _DPP_FLOOR)))
            row = tl.minimum(tl.maximum(row, -bound), bound)
            tl.store(factor + t * n + rows, row, mask=inside)
            rest -= row * row
            rest = tl.where(rows == pick, float("-inf"), rest)
            tl.store(left + rows, rest, mask=inside)
            value = tl.where(rest == float("-inf"), rest, tl.maximum(rest, q * q * _DPP_FLOOR))
            here = tl.max(value, 0)
            where = tl.min(tl.where(inside & (value >= here - here * _DPP_TIE), rows, n), 0)
            better = (here > high + tl.maximum(high, 0.0) * _DPP_TIE) | (place == n)
            high_gain = tl.where(better, tl.sum(tl.where(rows == where, value, 0.0), 0), high_gain)
            place = tl.where(better, where, place)
            high = tl.maximum(high, here)
        tl.store(slots + now + program, high)
        tl.store(places + now + program, place)
        tl.store(gains + now + program, high_gain)
        if t + 1 < last_step:
            _meet(arrived + batch, (t - first_step + 1) * PROGRAMS, PROGRAMS)


def _run(
    kernel: triton.JITFunction, tensors: tuple[Tensor, ...], slots: int, x: Tensor, k: int, **flags: int
) -> None:
    """Launch a greedy kernel: cooperatively, or step by step."""
    batch, n, d = x.shape
    programs = max(1, min(triton.cdiv(n, 8), multiprocessors(x.device) // batch))
    share = triton.cdiv(n, programs)
    programs = triton.cdiv(n, share)
    scratch = [torch.empty(batch, 2, programs, dtype=torch.float32, device=x.device) for _ in range(slots)]
    scratch.insert(1, torch.empty(batch, 2, programs, dtype=torch.int32, device=x.device))
    arrived = torch.zeros(batch, dtype=torch.int32, device=x.device)
    flags |= dict(
        PROGRAMS=programs, BLOCK_N=min(16, triton.next_power_of_2(share)),
        BLOCK_D=min(256, triton.next_power_of_2(d)), BLOCK_P=triton.next_power_of_2(programs),
    )  # fmt: skip
    together = programs > 1 and COOPERATIVE
    extra = dict(launch_cooperative_grid=True) if together else {}
    with on_device(x):
        for first, last in [(0, k)] if together or programs == 1 else [(t, t + 1) for t in range(k)]:
            kernel[(programs, batch)](
                *tensors,
                *scratch,
                arrived,
                first,
                last,
                n,
                k,
                d,
                share,
                x.stride(0),
                x.stride(1),
                **flags,
                **extra,
            )


def farthest_point(features: Tensor, k: int, start: Tensor | None = None) -> Tensor:
    batch, n, d = features.shape
    if not min(batch, k, d):
        return reference_select.farthest_point(features, k, start)
    out = torch.empty(batch, k, dtype=torch.long, device=features.device)
    x = last_contiguous(features)
    inverse = _inverse_norm(x)
    if start is None:
        start = first_max(-_search(x, inverse, 0, 0, 1)[0], TIE)
    score = torch.full((batch, n), torch.inf, device=x.device)
    _run(_farthest, (x, inverse, start, out, score), 1, x, k)
    return out


def greedy_map(features: Tensor, quality: Tensor, k: int) -> Tensor:
    batch, n, d = features.shape
    if not min(batch, k, d):
        return reference_select.greedy_map(features, quality, k)
    out = torch.empty(batch, k, dtype=torch.long, device=features.device)
    x = last_contiguous(features)
    q = quality.float()
    q = (q / q.abs().amax(-1, keepdim=True).clamp_min(1e-30)).contiguous()
    left = q * q
    start = first_max(left, DPP_TIE * left.amax(-1, keepdim=True))
    factor = torch.empty(batch, k, n, dtype=torch.float32, device=x.device)
    tensors = (x, _inverse_norm(x), q, start, out, left, factor)
    _run(_greedy, tensors, 2, x, k, BLOCK_T=16)
    return out
