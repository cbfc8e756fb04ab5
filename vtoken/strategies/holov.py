"""HoloV: the budget is divided over runs of the picture by attention and by diversity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..selection import Selection
from ..tokens import Needs, TowerInfo, VisualTokens
from .base import Strategy, top_k
from .common.grouping import local_cells, rows_per_segment, unit
from .common.scores import AnyScore, attention_needs, attention_scores, score_of
from .registry import register


@register(
    "holov",
    summary="Divide the budget over parts of the picture by their attention and the variety of their tokens, "
    "keep the most attended of each.",
    stages=("projector",),
    paper="Don't Just Chase Highlighted Tokens in MLLMs: Revisiting Visual Holistic Context Retention, "
    "arXiv 2510.02912",
    code="github.com/obananas/HoloV",
    code_licence="Apache-2.0",
    differs="Variety is brought to the scale of attention over the whole segment; the public code does it in "
    "each part, whose score is then 1 + beta times its mean attention, so that variety decides nothing "
    "(scale='part'). Tokens that a part has no room for go to the others; the public code reads zero vectors "
    "in their place (surplus='zeros'). Kept tokens stay in raster order, those of the public code in order "
    "of attention within a part. Crops of anyres images keep a share each.",
)
@dataclass
class HoloV(Strategy):
    """Holistic visual token pruning (arXiv 2510.02912).

    The tokens of a segment are cut into `parts` runs in raster order. A token's variety is the variance of
    its cosines with the other tokens of its run, its own (zero) included. A run scores the mean of
    `a + beta * variety` with `a` the attention of its tokens and variety scaled to the mean of `a`; the
    budget is divided in proportion to the scores, rounded down, one more for the highest runs. Each run keeps
    its tokens of highest `a`.

    Args:
        parts: number of runs; None for 16 where the score is "cls", and `16/9 * n / K` where it is
            "received", for K of n tokens.
        beta: weight of variety.
        scale: "segment", or "part" as the public code.
        surplus: "shared", or "zeros" as the public code.
        score: "cls", "received" (attention received by each patch), or "auto" by the tower.
        keep_newline: keep image-newline and separator tokens, on top of the budget.

    Raises:
        ValueError: for less than one part or a negative beta.
    """

    parts: int | None = None
    beta: float = 0.09
    scale: Literal["segment", "part"] = "segment"
    surplus: Literal["shared", "zeros"] = "shared"
    score: AnyScore = "auto"
    keep_newline: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts is not None and self.parts < 1:
            raise ValueError(f"parts must be a whole number of at least 1, found {self.parts}.")
        if self.beta < 0:
            raise ValueError(f"beta must be at least 0, found {self.beta}.")

    def needs(self, tower: TowerInfo | None) -> Needs:
        layers = (0,) if tower is None else tower.layers_up_to_feature(1)
        return attention_needs(score_of(self.score, tower), layers)

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.tower is not None
        kind, n = score_of(self.score, tokens.tower), len(tokens)
        scores = attention_scores(tokens, kind, tokens.tower.layers_up_to_feature(1)[0])
        rows = rows_per_segment(tokens)
        kept = [tokens.separator_rows] if self.keep_newline else []
        empty: list[Tensor] = []
        for row, mine, cells, count in zip(
            scores, rows, local_cells(tokens, rows), self.counts(tokens.segments), strict=True
        ):
            if not count:
                continue
            parts = self._parts(len(mine), count, kind == "cls")
            stays = self._stays(tokens.features[mine], row[cells].double(), count, parts)
            kept.append(mine[stays])
            gone = torch.ones(len(mine), dtype=torch.bool, device=mine.device).index_fill_(0, stays, False)
            empty.append(mine[gone][: count - len(stays)])
        keep = torch.cat([*kept, *empty]).sort().values
        zeros = torch.cat(empty) if empty else keep[:0]
        if not len(zeros):
            return Selection(keep)
        owner = torch.full((n,), -1, device=keep.device)
        owner[zeros] = zeros
        return Selection.merge(keep, owner, torch.zeros(n, device=keep.device))

    def _parts(self, n: int, count: int, published: bool) -> list[int]:
        """Lengths of the runs of n tokens."""
        parts = (16 if published else max(1, int(16 / 9 * n / count))) if self.parts is None else self.parts
        parts = min(parts, n)
        return [n // parts + (i < n % parts) for i in range(parts)]

    def _stays(self, x: Tensor, attention: Tensor, count: int, parts: list[int]) -> Tensor:
        """The kept tokens of a segment (n, d), ascending."""
        variety = torch.cat([_variety(run) for run in unit(x.double()).split(parts)])
        runs = list(zip(attention.split(parts), variety.split(parts), strict=True))
        each = [(attention, variety)] * len(runs) if self.scale == "segment" else runs
        # attention counts 1000 times, as published: the small number added to the divisor is meant for that
        score = torch.stack(
            [
                1000 * a.mean() + self.beta * v.mean() * 1000 * whole.mean() / (spread.mean() + 1e-6)
                for (a, v), (whole, spread) in zip(runs, each, strict=True)
            ]
        )
        numbers = self._numbers(score / score.sum().clamp(min=1e-300), count, parts)
        starts = [sum(parts[:i]) for i in range(len(parts))]
        return torch.cat([s + top_k(a, k) for s, (a, _), k in zip(starts, runs, numbers, strict=True)])

    def _numbers(self, share: Tensor, count: int, room: list[int]) -> list[int]:
        """Tokens of every run: its share, rounded down; the rest go to the runs with the largest shares."""
        order: list[int] = share.sort(descending=True, stable=True).indices.tolist()
        numbers = [int(s * count + 1e-9) for s in share.tolist()]  # a share of one third, times three
        for i in order[: count - sum(numbers)]:
            numbers[i] += 1
        numbers = [min(k, size) for k, size in zip(numbers, room, strict=True)]
        if self.surplus == "shared":
            for i in order:
                numbers[i] += min(room[i] - numbers[i], count - sum(numbers))
        return numbers


def _variety(x: Tensor) -> Tensor:
    """(s,) variance of the cosines of unit rows (s, d) with the others, their own counted as zero."""
    others = max(1, len(x) - 1)
    cosine = (x @ x.mT).fill_diagonal_(0.0)
    return (cosine - cosine.sum(1, keepdim=True) / others).square().sum(1) / others
