"""Triton kernel of greedy coverage, in one launch as those of `select`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference_select
from ..reference_select import COVER_LIFT, COVER_TIE, first_max
from .common import last_contiguous
from .select import _agree, _meet, _run

_COVER_TIE = tl.constexpr(COVER_TIE)


@triton.jit(do_not_specialize=["first_step", "last_step", "n", "k", "d", "share", "x_batch", "x_row"])
def _cover(
    x, weight, lift, start, out, covered, slots, places, arrived, first_step, last_step, n, k, d, share,
    x_batch, x_row,
    PROGRAMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """x: values (n, d). weight: -1 for chosen tokens. covered: (2, d), of the step before and of this one."""
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x, weight, lift, covered = (
        x + batch * x_batch,
        weight + batch * n,
        lift + batch * d,
        covered + batch * 2 * d,
    )
    slots, places = slots + batch * 2 * PROGRAMS, places + batch * 2 * PROGRAMS
    for t in range(first_step, last_step):
        before, now = (t + 1) % 2, t % 2
        if t == 0:
            pick = tl.load(start + batch).to(tl.int32)
        else:
            pick = _agree(
                slots + before * PROGRAMS, places + before * PROGRAMS, n, PROGRAMS, BLOCK_P, _COVER_TIE, 0.0
            )
        if program == 0:
            tl.store(out + batch * k + t, pick.to(tl.int64))
        high, place = float("-inf"), n
        for first in range(program * share, tl.minimum((program + 1) * share, n), BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            inside = (rows < n) & (rows < (program + 1) * share)
            total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            for column in range(0, d, BLOCK_D):
                cols = column + tl.arange(0, BLOCK_D)
                within = cols < d
                level = tl.load(covered + before * d + cols, mask=within, other=0.0, volatile=True)
                chosen = tl.load(x + pick.to(tl.int64) * x_row + cols, mask=within, other=0.0).to(tl.float32)
                level = tl.maximum(level, chosen + tl.load(lift + cols, mask=within, other=0.0))
                if program == 0:  # all compute the same; the others read it after the barrier
                    tl.store(covered + now * d + cols, level, mask=within)
                at = x + rows.to(tl.int64)[:, None] * x_row + cols[None, :]
                value = tl.load(at, mask=inside[:, None] & within[None, :], other=0.0).to(tl.float32)
                total += tl.maximum(value - level[None, :], 0.0)
            factor = tl.load(weight + rows, mask=inside, other=-1.0)
            factor = tl.where(rows == pick, -1.0, factor)
            tl.store(weight + rows, factor, mask=inside)
            value = tl.where(factor < 0, float("-inf"), tl.sum(total, 1) * factor)
            here = tl.max(value, 0)
            where = tl.min(tl.where(inside & (value >= here - here * _COVER_TIE), rows, n), 0)
            better = (here > high + tl.maximum(high, 0.0) * _COVER_TIE) | (place == n)
            place = tl.where(better, where, place)
            high = tl.maximum(high, here)
        tl.store(slots + now * PROGRAMS + program, high)
        tl.store(places + now * PROGRAMS + program, place)
        if t + 1 < last_step:
            _meet(arrived + batch, (t - first_step + 1) * PROGRAMS, PROGRAMS)


def greedy_cover(values: Tensor, weight: Tensor, k: int) -> Tensor:
    batch, _, things = values.shape
    if not min(batch, k, things):
        return reference_select.greedy_cover(values, weight, k)
    out = torch.empty(batch, k, dtype=torch.long, device=values.device)
    x = last_contiguous(values)
    weight = weight.to(torch.float32, copy=True).contiguous()
    lift = x.amax(1).float().clamp_min_(0).mul_(COVER_LIFT).contiguous()
    gains = x.float().clamp_min(0).sum(-1) * weight
    start = first_max(gains, COVER_TIE * gains.amax(-1, keepdim=True))
    covered = torch.zeros(batch, 2, things, dtype=torch.float32, device=x.device)
    _run(_cover, (x, weight, lift, start, out, covered), 1, x, k)
    return out
