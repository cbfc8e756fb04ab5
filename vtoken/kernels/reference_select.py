"""Plain torch twins of the token selection kernels (greedy max-min, greedy MAP of a DPP, bipartite matching).

Cosines are float32 sums whose last bits depend on the order of summation, so values within `TIE` count as equal and
the lower index wins; both backends then pick the same tokens, exact duplicates included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import compute_dtype, full_precision, merge_map, unit_rows

TIE = 1e-6  # two cosines closer than this are a tie
DPP_TIE = 1e-5  # the same for residual variances, relative
DPP_FLOOR = 1e-5  # share of its own variance under which a token counts as explained by the chosen ones
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
        return match_tensors(keys.new_empty(batch, 0), keys.new_empty(batch, 0, dtype=torch.long), n, 0, protect, sort)
    sources, targets = unit[:, a::2], unit[:, b::2].mT
    best, to = [], []
    rank = torch.arange(targets.shape[2], 0, -1, dtype=unit.dtype, device=keys.device)  # highest for the first
    step = max(1, 2**22 // max(1, batch * targets.shape[2]))
    for i in range(0, sources.shape[1], step):
        cosine = sources[:, i : i + step] @ targets
        best.append(cosine.amax(-1))
        # Many times faster than argmax along short rows.
        first = cosine.ge_(best[-1][..., None] - TIE).mul_(rank).amax(-1)
        to.append((targets.shape[2] - first).long())
    return match_tensors(torch.cat(best, 1), torch.cat(to, 1), n, r, protect, sort)


def match_tensors(best: Tensor, to: Tensor, n: int, r: int, protect: int, sort: bool) -> list[Tensor]:
    """From each A token's best cosine and partner (rank within B): source, target, keep and owner."""
    batch, device = best.shape[0], best.device
    if not r:
        none = torch.empty(batch, 0, dtype=torch.long, device=device)
        everything = torch.arange(n, device=device).repeat(batch, 1)
        return [none, none.clone(), everything, everything.clone()]
    a, b = parity_split(n, protect)
    order = (best * RANK_STEPS).round().argsort(dim=-1, descending=True, stable=True)
    source, target = a + 2 * order[:, :r], b + 2 * to.gather(1, order[:, :r])
    stay = order[:, r:].sort(-1).values if sort else order[:, r:]
    prefix, odd = torch.arange(protect, device=device), torch.arange(b, n, 2, device=device)
    keep = torch.cat([prefix.expand(batch, -1), a + 2 * stay, odd.expand(batch, -1)], 1)
    return [source, target, keep, merge_map(source, target, keep)]


class _Cosines:
    """Rows of the cosine matrix of (B, n, d) features; the matrix is kept only where it is no larger than they are."""

    def __init__(self, features: Tensor, scale: Tensor | None = None):
        self.unit = unit_rows(features)
        if scale is not None:
            self.unit *= scale[..., None]
        self.batch, self.n, d = self.unit.shape
        self.all = self.unit @ self.unit.mT if self.n <= d else None
        self.b = torch.arange(self.batch, device=features.device)

    def row(self, pick: Tensor) -> Tensor:
        if self.batch == 1:  # without the cost of indexing by tensors
            if self.all is not None:
                return self.all[0].index_select(0, pick)
            return self.unit[0].index_select(0, pick) @ self.unit[0].T
        if self.all is not None:
            return self.all[self.b, pick]
        return (self.unit @ self.unit[self.b, pick][..., None])[..., 0]

    def nearest_other(self) -> Tensor:
        """Highest cosine of each row with another row, (B, n); -inf for a row that is alone."""
        out = []
        for i in range(0, self.n, 256):
            rows = slice(i, i + 256)
            block = self.unit[:, rows] @ self.unit.mT if self.all is None else self.all[:, rows].clone()
            block.diagonal(i, 1, 2).fill_(-torch.inf)
            out.append(block.amax(-1))
        return torch.cat(out, 1)


@full_precision
def farthest_point(features: Tensor, k: int, start: Tensor | None = None) -> Tensor:
    batch = features.shape[0]
    if not batch or not k:
        return torch.empty(batch, k, dtype=torch.long, device=features.device)
    cosines = _Cosines(features)
    pick = first_max(-cosines.nearest_other(), TIE) if start is None else start.long()
    picks = [pick]
    closest = cosines.row(pick).clone()  # cosine with the nearest chosen token; +inf once chosen itself
    hit = torch.empty_like(closest)
    for _ in range(1, k):
        closest.scatter_(1, pick[:, None], torch.inf)
        near = closest.amin(-1, keepdim=True).add_(TIE)
        pick = torch.le(closest, near, out=hit).argmax(-1)
        picks.append(pick)
        torch.maximum(closest, cosines.row(pick), out=closest)
    return torch.stack(picks, 1)


@full_precision
def greedy_map(features: Tensor, quality: Tensor, k: int) -> Tensor:
    batch, n, _ = features.shape
    if not batch or not k:
        return torch.empty(batch, k, dtype=torch.long, device=features.device)
    q = quality.to(compute_dtype(features))
    q = q / q.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    kernel = _Cosines(features, q)
    gain = q * q  # variance of each token that the chosen ones do not explain, at least its floor; -inf once chosen
    floor, hit = DPP_FLOOR * gain, torch.empty_like(gain)
    factor = q.new_empty(batch, k, n)  # rows of the incremental Cholesky factor
    picks = []
    for t in range(k):
        enough = gain.amax(-1, keepdim=True).mul_(1 - DPP_TIE)
        at = torch.ge(gain, enough, out=hit).argmax(-1, keepdim=True)
        picks.append(at)
        row = kernel.row(at[:, 0])[:, None]
        if t:
            head = factor[:, :t]
            along = head.index_select(2, at[0]) if batch == 1 else head.gather(2, at[:, None].expand(-1, t, 1))
            row = torch.baddbmm(row, along.mT, head, alpha=-1)
        step = torch.mul(row[:, 0], gain.gather(1, at).clamp_min_(1e-30).rsqrt_(), out=factor[:, t])
        gain.addcmul_(step, step, value=-1).scatter_(1, at, -torch.inf)
        floor.scatter_(1, at, -torch.inf)
        torch.maximum(gain, floor, out=gain)
    return torch.cat(picks, 1)
