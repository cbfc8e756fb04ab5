"""Bases of the methods that shorten the sequence inside an encoder, between attention and MLP."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..selection import Selection
from ..tokens import EncoderShape, Segment, TowerInfo, VisualTokens
from .base import Strategy
from .budgets import check_budget
from .common.matching import merge_down


@dataclass
class EncoderStrategy(Strategy):
    """Base of methods inside an encoder: write `encoder_plan` and `merge_in_encoder`.

    `merge_in_encoder` is asked in every layer for which `asked` is true, between its attention and its MLP.
    In a vision-language model one token per merged group enters the LLM, in the place on the grid at which
    the group stands. If more groups are left of a crop than its budget (a model that cuts off padding cuts
    off whole groups), the most similar of their features are merged until it is met.

    Args:
        keep_newline: keep image-newline and separator tokens, on top of the budget.
    """

    budget: float | int | None = None  # type: ignore[assignment]
    _: KW_ONLY
    keep_newline: bool = False

    serves_llms: ClassVar[bool] = True  # whether it fits the tower of a vision-language model
    drops: ClassVar[bool] = False  # whether tokens are dropped and not only merged
    needs_cls: ClassVar[bool] = False  # whether the encoder must have a class token
    static_counts: ClassVar[bool] = False

    def encoder_plan(self, shape: EncoderShape) -> Any:
        """What the method decides from the numbers of the encoder alone; `tokens.plan` of its layers.

        Raises:
            ValueError: if the options do not fit this encoder.
        """
        raise NotImplementedError

    def begin_encoder(self, run: Any) -> None:
        """Called before the first layer of a plain encoder; ValueError for a batch that does not fit."""

    def asked(self, layer: int, plan: Any) -> bool:
        """Whether the method acts in this layer."""
        return layer < len(plan) and plan[layer] > 0

    @property
    def proportional(self) -> bool:
        """Whether the logarithm of a token's size is added to the attention logits of its key."""
        return bool(getattr(self, "prop_attn", False))

    def enter_layer(self, x: Tensor, run: Any) -> Tensor:
        """The tokens (rows, n, C) as a layer reads them; `run` is the `EncoderRun`."""
        return x

    def encoder_layers(self, tower: TowerInfo) -> tuple[int, ...]:
        return tuple(range(tower.feature_layer + 1))

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Upper limit of the tokens per segment that enter the LLM."""
        budget = self.budget if budget is None else budget
        return [s.fed for s in segments] if budget is None else self.allowance(budget).tokens(segments)

    def select(self, tokens: VisualTokens) -> Selection:
        if tokens.merged is None:
            raise ValueError(
                f"{self.info.name} merges inside the vision tower, where this model cannot shorten its"
                f" {tokens.modality} input, whose patches are pooled before the LLM: choose another strategy"
                " for it."
            )
        place = self._places(tokens, tokens.merged)
        size = torch.bincount(place[place >= 0], minlength=len(tokens)).float()
        keep = size.nonzero()[:, 0]
        owner, weight = torch.full_like(place, -1), torch.ones_like(size)
        owner[keep] = keep
        if self.keep_newline:
            owner[tokens.separator_rows] = tokens.separator_rows
        segment = tokens.segment_of[keep]
        for i, limit in enumerate(self.counts(tokens.segments)):
            mine = keep[segment == i]
            if not limit:  # a whole number of tokens that is smaller than the number of crops
                owner[mine] = -1
            elif len(mine) > limit:
                owner[mine] = mine[merge_down(tokens.features[mine], size[mine], limit)]
                total = torch.zeros_like(size).index_add_(0, owner[mine], size[mine])
                weight[mine] = size[mine] / total[owner[mine]]
        left = owner[owner >= 0].unique()
        alone = len(left) == int((owner >= 0).sum())
        return Selection(left) if alone else Selection.merge(left, owner, weight)

    @staticmethod
    def _places(tokens: VisualTokens, merged: Tensor) -> Tensor:
        """(n,) int64, the token in whose place each token's group stands, -1 for dropped and separators.

        A group whose place the model cut off as padding stands at its first token.
        """
        rows, cells = tokens.patch_rows, tokens.cells[tokens.patch_rows]
        group = merged[cells]
        rows, cells, group = rows[group >= 0], cells[group >= 0], group[group >= 0]
        first = torch.full((tokens.num_cells,), len(tokens), device=rows.device)
        first = first.scatter_reduce(0, group, rows, "amin")
        first = first.index_copy(0, cells[cells == group], rows[cells == group])
        return torch.full((len(tokens),), -1, device=rows.device).index_copy(0, rows, first[group])


@dataclass
class ScheduledMerging(EncoderStrategy):
    """Base of methods that remove a number of tokens per layer, known before the image is seen.

    Give one of `budget`, `r` and `flops`; without any, half of the patch tokens are left.

    Args:
        budget: share of the patch tokens (or their number) that is left after the last layer; every layer
            removes equally many, up to rounding.
        r: tokens that every layer removes, or a list of them, layer by layer.
        flops: share in (0, 1] of the encoder's multiply-adds; every layer removes equally many tokens.
        schedule: with a single r: "constant", or linear from 2r to 0 ("decreasing") or from 0 to 2r
            ("increasing"), in whole numbers as ToMe's code makes them.
        prop_attn: add the logarithm of a token's size to the attention logits of its key.
    """

    r: int | tuple[int, ...] | None = None
    flops: float | None = None
    schedule: Literal["constant", "decreasing", "increasing"] = "constant"
    prop_attn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [n for n in ("budget", "r", "flops") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"Give one of budget, r and flops, found {' and '.join(given)}.")
        removed = [] if self.r is None else [self.r] if isinstance(self.r, int) else list(self.r)
        if any(r < 0 for r in removed):
            raise ValueError(f"r must be 0 or more tokens per layer, found {self.r}.")
        if self.flops is not None and not 0 < self.flops <= 1:
            raise ValueError(f"flops must be a share in (0, 1], found {self.flops}.")
        if self.schedule != "constant" and not isinstance(self.r, int):
            raise ValueError(f"schedule={self.schedule!r} goes with a whole number r, found r={self.r}.")

    @property
    def is_identity(self) -> bool:
        if self.r is not None:
            return not any([self.r] if isinstance(self.r, int) else self.r)
        return (
            self.flops == 1.0
            if self.flops is not None
            else self.budget == 1.0 and not isinstance(self.budget, int)
        )

    def most(self, patches: int) -> int:
        """Tokens that one layer can remove from so many patch tokens."""
        return patches // 2

    def encoder_plan(self, shape: EncoderShape) -> tuple[int, ...]:
        """Tokens that each layer removes."""
        if self.r is not None:
            return self._capped(self._from_r(shape.layers), shape.patches)
        if self.flops is not None:
            return self._from_flops(shape, self.flops)
        return self._from_budget(shape)

    def _from_r(self, layers: int) -> Sequence[float]:
        r = self.r
        if not isinstance(r, int):
            if len(r or ()) > layers:
                raise ValueError(f"r names {len(r or ())} layers, the encoder has {layers} that count.")
            return [*(r or ()), *[0] * (layers - len(r or ()))]
        if self.schedule == "constant" or layers == 1:
            return [r] * layers
        first, last = (2 * r, 0) if self.schedule == "decreasing" else (0, 2 * r)
        return [int(first + (last - first) / (layers - 1) * i) for i in range(layers)]

    def _capped(self, wanted: Sequence[float], patches: int, carry: bool = False) -> tuple[int, ...]:
        """The numbers, each cut to what its layer can remove; `carry` passes the rest on to later layers."""
        plan, debt = [], 0
        for r in wanted:
            debt = int(r) + (debt if carry else 0)
            plan.append(max(0, min(debt, self.most(patches))))
            patches, debt = patches - plan[-1], debt - plan[-1]
        return tuple(plan)

    def _even(self, total: float, shape: EncoderShape) -> tuple[int, ...]:
        """`total` tokens over all layers, equally many in each up to rounding and the cap."""
        at = [int(total * i / shape.layers) for i in range(shape.layers + 1)]
        return self._capped([b - a for a, b in pairwise(at)], shape.patches, carry=True)

    def _from_budget(self, shape: EncoderShape) -> tuple[int, ...]:
        budget = 0.5 if self.budget is None else check_budget(self.budget)
        left = self.allowance(budget).part(shape.patches)
        removed, most = shape.patches - left, shape.patches * shape.layers
        least = shape.patches - sum(self._even(most, shape))
        if least > left:
            raise ValueError(
                f"{self.info.name} cannot go from {shape.patches} patch tokens to {left} in {shape.layers}"
                f" layers: use a budget that leaves at least {least}."
            )
        # where the last layers cannot remove their share, all remove more, and the last ones less
        totals = range(removed, most + 1)
        plan = self._even(
            totals[bisect_left(totals, removed, key=lambda t: sum(self._even(t, shape)))], shape
        )
        return self._capped([min(r, removed - sum(plan[:i])) for i, r in enumerate(plan)], shape.patches)

    def _from_flops(self, shape: EncoderShape, share: float) -> tuple[int, ...]:
        target = share * shape.macs([0] * shape.layers)
        low, high = 0.0, float(shape.patches * shape.layers)
        if shape.macs(self._even(high, shape)) > target:
            least = shape.macs(self._even(high, shape)) / shape.macs([0] * shape.layers)
            raise ValueError(
                f"{self.info.name} cannot bring this encoder down to flops={share}: it reaches {least:.2f}."
            )
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if shape.macs(self._even(middle, shape)) > target else (low, middle)
        return self._even(high, shape)

    def describe(self) -> str:
        name, inside = super().describe().removesuffix(")").split("(", 1)
        given = any(x is not None for x in (self.budget, self.r, self.flops))
        return f"{name}({inside if given else ', '.join(x for x in ('budget=0.5', inside) if x)})"
