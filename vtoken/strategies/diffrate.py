"""DiffRate: in every layer prune the least attended tokens, merge the next ones, at learned rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..checks import found
from ..selection import EncoderMerge
from ..tokens import EncoderShape, EncoderTokens
from .common.grouping import unit
from .common.published_rates import FORMS, published, scaled
from .merging import EncoderStrategy
from .registry import register


@register(
    "diffrate",
    summary="In every layer prune the patch tokens that the class token attends to least and merge the next "
    "ones into their most similar important token, at rates learned per layer.",
    stages=("encoder",),
    budget_means="encoder",
    paper="DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, arXiv 2305.17997",
    code="github.com/OpenGVLab/DiffRate",
    code_licence="no licence stated",
    differs="All prefix tokens stay in front, are never destinations and are left out of the ranking. Tokens "
    "are "
    "only sorted by importance where some go. With average pooling a survivor counts by the patches that it "
    "holds, not by its scaled size, and pruned patches read the survivors' mean. budget and flops without "
    "learned rates are ours: a published row of the nearest depth, its shares raised to a power that meets "
    "the "
    "goal. Encoders without class token are refused (the published CAFormer variant is left out).",
)
@dataclass
class DiffRate(EncoderStrategy):
    """Differentiable compression rate (arXiv 2305.17997); `vtoken.rates.learn_rates` learns the rates.

    Importance is the class token's attention, the mean over heads; similarity is the cosine of the residual
    stream after attention. Groups become plain means; their sizes add, each merged one scaled by its cosine.
    Give one of `rates`, `prune` with `merge`, `budget` and `flops`; without any, `flops=0.65`.

    Args:
        rates: a published row by model and GFLOPs, such as "ViT-S-DeiT/2.9".
        prune: per layer, tokens that are left after pruning, class token included; goes with `merge`.
        merge: per layer, tokens that are left after merging, class token included.
        budget: share of the patch tokens that is left after the last layer.
        flops: share in (0, 1] of the encoder's multiply-adds.
        prop_attn: add the logarithm of a token's size to the attention logits of its key.
    """

    rates: str | None = None
    prune: tuple[int, ...] | None = None
    merge: tuple[int, ...] | None = None
    flops: float | None = None
    prop_attn: bool = True

    serves_llms: ClassVar[bool] = False
    drops: ClassVar[bool] = True
    needs_cls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [n for n in ("rates", "prune", "budget", "flops") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(
                f"Give one of rates, prune with merge, budget and flops, found {' and '.join(given)}."
            )
        if (self.prune is None) != (self.merge is None) or len(self.prune or ()) != len(self.merge or ()):
            raise ValueError("prune and merge go together and name equally many layers.")
        if any(k < 2 for k in (*(self.prune or ()), *(self.merge or ()))):
            raise ValueError(
                "prune and merge keep the class token and at least one patch: 2 or more per layer."
            )
        if self.flops is not None and not 0 < self.flops <= 1:
            raise ValueError(f"flops must be a share in (0, 1], found {self.flops}.")
        if self.rates is not None:
            self._row()

    @property
    def is_identity(self) -> bool:
        return self.flops == 1.0 or super().is_identity

    def _row(self) -> dict[str, Any]:
        model, _, rate = str(self.rates).partition("/")
        row = published().get(model, {"rates": {}})
        if rate not in row["rates"]:
            named = ", ".join(f"{m}/{r}" for m, each in published().items() for r in each["rates"])
            raise ValueError(f"There are no published rates {found(self.rates)}; there are {named}.")
        return row | row["rates"][rate]

    def encoder_plan(self, shape: EncoderShape) -> list[tuple[int, int] | None]:
        if self.rates is None and self.prune is None:
            return self._met(shape)
        extra, prune, merge = shape.prefix - 1, self.prune, self.merge
        if self.rates is not None:
            row = self._row()
            if (row["tokens"] - 1, row["depth"]) != (shape.patches, shape.layers):
                raise ValueError(
                    f"The rates {self.rates} are for {row['tokens'] - 1} patches and {row['depth']} layers,"
                    f" this encoder has {shape.patches} and {shape.layers}: use flops=... or learn_rates."
                )
            prune, merge = row["prune"], row["merge"]
        assert prune is not None and merge is not None
        if len(prune) != shape.layers:
            raise ValueError(f"prune and merge name {len(prune)} layers, the encoder has {shape.layers}.")
        if (most := max(*prune, *merge)) > shape.patches + 1:
            raise ValueError(
                f"prune and merge keep up to {most} tokens, class token included, this encoder reads only"
                f" {shape.patches + 1}: the numbers are for more patches; use flops=... or learn_rates."
            )
        return self._steps(shape, [k + extra for k in prune], [k + extra for k in merge])

    @staticmethod
    def _steps(
        shape: EncoderShape, prune: Sequence[int], merge: Sequence[int]
    ) -> list[tuple[int, int] | None]:
        """Per layer the tokens kept after pruning and after merging, None where all stay."""
        n, steps = shape.patches + shape.prefix, []
        for after_prune, after_merge in zip(prune, merge, strict=True):
            kept = min(n, after_prune)
            left = min(kept, after_merge)
            steps.append((kept, left) if left < n else None)
            n = left
        return steps

    def _met(self, shape: EncoderShape) -> list[tuple[int, int] | None]:
        """Rates of the form of a published row that meet the budget or the FLOPs."""
        form = min(FORMS, key=lambda depth: abs(depth - shape.layers))
        row = published()[FORMS[form][0]]
        row = row | row["rates"][FORMS[form][1]]
        flops = 0.65 if self.flops is None and self.budget is None else self.flops

        def steps(power: float) -> list[tuple[int, int] | None]:
            return self._steps(
                shape, *(scaled(row[k], row["tokens"], shape, power) for k in ("prune", "merge"))
            )

        def left(power: float) -> float:
            removed, n = [], shape.patches + shape.prefix
            for step in steps(power):
                removed.append(0 if step is None else n - step[1])
                n -= removed[-1]
            if flops is not None:
                return shape.macs(removed) / shape.macs([0] * shape.layers) / flops
            return (n - shape.prefix) / max(1, int(self.allowance().allowed(shape.patches)))

        low, high = 0.0, 64.0
        if left(high) > 1:
            goal, wanted = ("flops", flops) if flops else ("budget", self.budget)
            raise ValueError(
                f"diffrate cannot reduce this encoder to {goal}={wanted}: it reaches {left(high):.2f} times"
                " that; use a larger one."
            )
        for _ in range(48):
            middle = (low + high) / 2
            low, high = (middle, high) if left(middle) > 1 else (low, middle)
        return steps(high)

    def describe(self) -> str:
        given = any(getattr(self, n) is not None for n in ("rates", "prune", "budget", "flops"))
        named, inside = super().describe()[:-1].split("(", 1)
        return f"{named}({inside if given else ', '.join(x for x in ('flops=0.65', inside) if x)})"

    def asked(self, layer: int, plan: Sequence[Any]) -> bool:
        return layer < len(plan) and plan[layer] is not None

    def merge_in_encoder(self, tokens: EncoderTokens) -> EncoderMerge | None:
        assert tokens.cls_attention is not None
        (kept, left), p = tokens.plan[tokens.layer], tokens.prefix
        rows, n, _ = tokens.hidden_states.shape
        ranks = tokens.cls_attention()[:, p:].sort(dim=1, descending=True, stable=True).indices + p
        order = torch.cat([torch.arange(p, device=ranks.device).expand(rows, -1), ranks], 1)
        place = torch.arange(left, device=ranks.device).expand(rows, -1)
        into = order.new_full((rows, n), -1).scatter(1, order[:, :left], place)
        sizes = tokens.sizes.gather(1, order[:, :left])
        if left < kept:
            index = order[:, p:kept, None].expand(-1, -1, tokens.hidden_states.shape[2])
            alike = unit(tokens.hidden_states.gather(1, index))
            best = (alike[:, left - p :] @ alike[:, : left - p].mT).max(2)
            source, target = order[:, left:kept], best.indices + p
            into = into.scatter(1, source, target)
            sizes = sizes.scatter_add(1, target, tokens.sizes.gather(1, source) * best.values.to(sizes))
        merge = EncoderMerge(order[:, :left], into, torch.ones_like(tokens.sizes), sizes)
        merge.weight = 1 / merge.sizes_of(merge.weight).gather(1, into.clamp(min=0))
        return merge
