"""Plain torch twins of the selection kernels (greedy max-min, MAP of a DPP, coverage; bipartite matching).

Cosines are float32 sums whose last bits depend on the order of summation, so values within `TIE` count as
equal and the lower index wins; both backends then pick the same tokens, exact duplicates included.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .reference import compute_dtype, full_precision, unit_rows

TIE = 1e-6  # two cosines closer than this are a tie
DPP_TIE = 1e-5  # likewise for residual variances, relative
DPP_FLOOR = 1e-5  # share of its own variance under which a token counts as explained by the chosen ones
COVER_TIE = 1e-5  # likewise for gains in coverage, relative
COVER_LIFT = 1e-6  # share of a column's largest value by which a token must exceed what covers it already
LOOKED_AT = 8  # tokens whose gain is computed again at once
RANK_STEPS = 2**20  # cosines are ranked after rounding to 1 / RANK_STEPS


def first_max(values: Tensor, slack: float | Tensor) -> Tensor:
    """values (B, n) -> (B,): the lowest index whose value is within `slack` of the maximum."""
    return torch.ge(values, values.amax(-1, keepdim=True) - slack, out=torch.empty_like(values)).argmax(-1)


def parity_split(n: int, protect: int) -> tuple[int, int]:
    """First even (set A) and first odd (set B) position that is not protected."""
    return protect + protect % 2, protect | 1


@full_precision
def bipartite_match(keys: Tensor, r: int, protect: int = 0, sort: bool = True) -> list[Tensor]:
    (batch, n, _), unit = keys.shape, unit_rows(keys)
    r = max(0, min(r, (n - protect) // 2))
    a, b = parity_split(n, protect)
    if not r:
        return match_tensors(
            keys.new_empty(batch, 0), keys.new_empty(batch, 0, dtype=torch.long), n, 0, protect, sort
        )
    sources, targets = unit[:, a::2], unit[:, b::2].mT
    count = targets.shape[2]
    rank = torch.arange(count, 0, -1, dtype=unit.dtype, device=keys.device)  # highest for the first
    best, to = [], []
    for block in sources.split(max(1, 2**22 // max(1, batch * count)), 1):
        cosine = block @ targets
        best.append(cosine.amax(-1))
        # Many times faster than argmax along short rows.
        to.append(cosine.ge_(best[-1][..., None] - TIE).mul_(rank).amax(-1))
    first = (count - (to[0] if len(to) == 1 else torch.cat(to, 1))).long()
    return match_tensors(best[0] if len(best) == 1 else torch.cat(best, 1), first, n, r, protect, sort)


def match_tensors(best: Tensor, to: Tensor, n: int, r: int, protect: int, sort: bool) -> list[Tensor]:
    """Source, target, keep and owner, from each A token's best cosine and partner (rank within B)."""
    batch, device = best.shape[0], best.device
    if not r:
        none = torch.empty(batch, 0, dtype=torch.long, device=device)
        everything = torch.arange(n, device=device).repeat(batch, 1)
        return [none, none.clone(), everything, everything.clone()]
    a, b = parity_split(n, protect)
    order = (best * RANK_STEPS).round_().argsort(dim=-1, descending=True, stable=True)
    target = to.gather(1, order[:, :r]).mul_(2).add_(b)
    source, stay = order.mul_(2).add_(a).split([r, order.shape[1] - r], 1)
    places = torch.arange(n, device=device).expand(batch, -1)
    keep = torch.cat([places[:, :protect], stay.sort(-1).values if sort else stay, places[:, b::2]], 1)
    owner = keep.new_empty(batch, n).scatter_(1, keep, places[:, : n - r])
    return [source.contiguous(), target, keep, owner.scatter_(1, source, owner.gather(1, target))]


class _Cosines:
    """Rows of the cosine matrix of (n, d) unit rows, on the host; kept whole only if no larger."""

    def __init__(self, unit: Tensor):
        self.unit, (n, d) = unit, unit.shape
        self.all = unit @ unit.mT if n <= d else None
        self.host = None if self.all is None else self.all.cpu().numpy()

    def row(self, pick: int) -> np.ndarray:
        return (self.unit @ self.unit[pick]).cpu().numpy() if self.host is None else self.host[pick]

    def nearest_other(self) -> np.ndarray:
        """Highest cosine of each row with another row, (n,); -inf for a row that is alone."""
        out = []
        for i in range(0, len(self.unit), 256):
            rows = slice(i, i + 256)
            block = self.unit[rows] @ self.unit.mT if self.all is None else self.all[rows].clone()
            block.diagonal(i).fill_(-torch.inf)
            out.append(block.amax(-1))
        return torch.cat(out).cpu().numpy()


# The steps of the two greedy loops run on the host in numpy: a step is a few operations on n numbers, and
# with torch each costs more to launch, on any device, than to do.
@full_precision
def farthest_point(features: Tensor, k: int, start: Tensor | None = None) -> Tensor:
    batch = features.shape[0]
    if not batch or not k:
        return torch.empty(batch, k, dtype=torch.long, device=features.device)
    starts = [None] * batch if start is None else start.tolist()
    picks = [
        _farthest(_Cosines(unit), k, first) for unit, first in zip(unit_rows(features), starts, strict=True)
    ]
    return torch.tensor(picks, device=features.device)


def _farthest(cosines: _Cosines, k: int, pick: int | None) -> list[int]:
    if pick is None:
        near = cosines.nearest_other()
        pick = int((near <= near.min() + near.dtype.type(TIE)).argmax())
    closest = cosines.row(pick).copy()  # cosine with the nearest chosen token; +inf once chosen itself
    tie, picks = closest.dtype.type(TIE), [pick]
    for _ in range(1, k):
        closest[pick] = np.inf
        pick = int((closest <= closest.min() + tie).argmax())
        picks.append(pick)
        np.maximum(closest, cosines.row(pick), out=closest)
    return picks


@full_precision
def greedy_map(features: Tensor, quality: Tensor, k: int) -> Tensor:
    batch = features.shape[0]
    if not batch or not k:
        return torch.empty(batch, k, dtype=torch.long, device=features.device)
    q = quality.to(compute_dtype(features))
    q = q / q.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    scaled = unit_rows(features) * q[..., None]
    picks = [
        _greedy(_Cosines(x), variance.cpu().numpy(), k) for x, variance in zip(scaled, q * q, strict=True)
    ]
    return torch.tensor(picks, device=features.device)


def _greedy(kernel: _Cosines, variance: np.ndarray, k: int) -> list[int]:
    # variance of each token that the chosen ones do not explain, at least its floor; -inf once chosen
    gain = variance.copy()
    number = gain.dtype.type
    floor, most, least = number(DPP_FLOOR) * gain, number(1 - DPP_TIE), number(1e-30)
    factor = np.empty((k, len(gain)), gain.dtype)  # rows of the incremental Cholesky factor
    picks: list[int] = []
    for step in factor:
        pick, done = int((gain >= gain.max() * most).argmax()), len(picks)
        picks.append(pick)
        np.subtract(kernel.row(pick), factor[:done, pick] @ factor[:done], out=step)
        step /= np.sqrt(max(gain[pick], least))
        # a covariance is at most the root of both variances; past the rank, rounding exceeds it and grows
        bound = np.sqrt(np.maximum(gain, 0))
        np.clip(step, -bound, bound, out=step)
        gain -= step * step
        gain[pick] = floor[pick] = -np.inf
        np.maximum(gain, floor, out=gain)
    return picks


@full_precision
def greedy_cover(values: Tensor, weight: Tensor, k: int) -> Tensor:
    batch = values.shape[0]
    if not batch or not k:
        return torch.empty(batch, k, dtype=torch.long, device=values.device)
    number = compute_dtype(values)
    each = zip(values.to(number).cpu().numpy(), weight.to(number).cpu().numpy(), strict=True)
    return torch.tensor([_cover(rows, w, k) for rows, w in each], device=values.device)


def _cover(values: np.ndarray, weight: np.ndarray, k: int) -> list[int]:
    """Lazy greedy: gains only shrink, so that the last gain of a token is a bound on its gain now."""
    number = values.dtype.type
    most, lift = number(1 - COVER_TIE), number(COVER_LIFT) * values.max(0, initial=0)
    covered, picks = np.zeros_like(lift), []
    score = _gains(values, covered) * weight  # -inf once chosen
    known = np.ones(len(values), bool)
    for _ in range(k):
        many = LOOKED_AT
        while True:
            near = score >= score.max() * most
            if known[near].all():
                break
            stale = np.flatnonzero(~known)
            if len(stale) > many:
                stale = stale[np.argpartition(score[stale], -many)[-many:]]
            score[stale] = _gains(values[stale], covered) * weight[stale]
            known[stale] = True
            many *= 2
        pick = int(near.argmax())
        picks.append(pick)
        np.maximum(covered, values[pick] + lift, out=covered)
        score[pick] = -np.inf
        known = score <= 0  # no gain stays no gain
    return picks


def _gains(values: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """(n,): the sums of the positive parts of values (n, m) above `covered` (m,)."""
    out = np.empty(len(values), values.dtype)
    for first in range(0, len(values), 256):
        above = values[first : first + 256] - covered
        out[first : first + 256] = np.maximum(above, 0, out=above).sum(1)
    return out
