"""Visual tokens per LLM layer, and the arithmetic of budgets that are an average over the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...tokens import PrefillTokens
from ..base import REFERENCE_DEPTH
from ..budgets import Budget


def after_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Layers before which to drop, at the relative depth of the published "after layer l of 32"."""
    scaled = {round(i * num_layers / REFERENCE_DEPTH) + 1 for i in layers}
    return tuple(sorted(i for i in scaled if i < num_layers))


def quarters(first: int, num_layers: int) -> tuple[int, ...]:
    """Three cuts, the first before layer `first`, as far apart as the quarters of the depth would then be."""
    cuts = [first * i * num_layers // (4 * max(1, num_layers // 4)) for i in (1, 2, 3)]
    for i in (1, 2):
        cuts[i] = max(cuts[i], cuts[i - 1] + 1)
    return tuple(i for i in cuts if i < num_layers)


def lengths(cuts: Sequence[int], num_layers: int) -> list[int]:
    """Number of layers before the first drop, between drops, and after the last."""
    edges = [0, *cuts, num_layers]
    return [b - a for a, b in pairwise(edges)]


def wanted(budget: float | int, tokens: PrefillTokens) -> float:
    """Visual tokens of this prompt that `budget` allows."""
    return Budget(budget).allowed(tokens.total_visual, tokens.units)


def bisect(function: Callable[[float], float], target: float, low: float = 0.0, high: float = 1.0) -> float:
    """The largest x in [low, high] with a rising function at or below `target`; `low` if there is none."""
    if function(high) <= target:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) <= target else (low, middle)
    return low


def ratio_for(average: float, spans: Sequence[int]) -> float:
    """The ratio r in [0, 1] with which 1, r, r^2, ... tokens over spans of layers have this average."""
    total = sum(spans)
    return bisect(lambda r: sum(span * r**i for i, span in enumerate(spans)) / total, average)


def counts_for(entered: int, average: float, spans: Sequence[int], name: str, least: int = 1) -> list[int]:
    """Visual tokens after every drop, shrinking by one ratio, for an average over all layers of `average`.

    Args:
        entered: visual tokens before the first drop.
        average: never exceeded, but for `least`, the smallest number that a drop may leave.
        spans: see `lengths`.
        name: of the strategy, for the error.

    Raises:
        ValueError: if the layers before the first drop alone read more.
    """
    refuse_if_unreachable(entered, average, spans, name)
    ratio = ratio_for(average / entered, spans)
    counts = [min(entered, max(least, int(entered * ratio**i + 1e-6))) for i in range(1, len(spans))]
    counts[-1] = last_count(entered, counts, average, spans, least)
    return counts


def last_count(
    entered: int, counts: Sequence[int], average: float, spans: Sequence[int], least: int = 1
) -> int:
    """The largest last count with which the average over all layers stays at or below `average`."""
    read = spans[0] * entered + sum(span * n for span, n in zip(spans[1:-1], counts[:-1], strict=True))
    above = counts[-2] if len(counts) > 1 else entered
    return min(above, max(least, int((average * sum(spans) - read) / spans[-1] + 1e-6)))


def refuse_if_unreachable(entered: float, average: float, spans: Sequence[int], name: str) -> None:
    """Raise ValueError if the layers before the first drop read more than the budget."""
    if spans[0] * entered <= average * sum(spans):
        return
    share, found = spans[0] / sum(spans), average / entered
    raise ValueError(
        f"{name} reads all visual tokens in its first {spans[0]} of {sum(spans)} layers, so that their"
        f" average stays above {share:.1%} of what enters the LLM, found a budget of {found:.1%}: choose"
        f" more, or let a projector strategy go before it, as in vtoken.patch(model, ['pool', '{name}'],"
        " budget=...)."
    )


def head_rows(tokens: PrefillTokens, rows: Tensor, chunk: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention of the layer before, from rows to visual tokens, in chunks: (rows (r,), (heads, r, v))."""
    visual = tokens.visual_rows
    for some in rows.split(chunk):
        yield some, tokens.attention_rows(some)[..., visual]


def mean_rows(tokens: PrefillTokens, rows: Tensor, alone: bool = False) -> Tensor:
    """(r, v) float32: the same averaged over heads; `alone`: of a softmax over the visual tokens alone."""
    parts = (attention for _, attention in head_rows(tokens, rows))
    tiny = torch.finfo(torch.float32).tiny
    return torch.cat([(a / a.sum(-1, keepdim=True).clamp(min=tiny) if alone else a).mean(0) for a in parts])


def check_layers(layers: Sequence[int] | None, what: str = "layers") -> None:
    """Raise ValueError unless `layers` is None or ascending 0-based layer indices."""
    if layers is None:
        return
    if not layers or layers[0] < 0 or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"{what} must be ascending 0-based LLM layers such as (8, 16, 24), found {layers!r}."
        )


def check_inside(cuts: Sequence[int], num_layers: int, name: str) -> None:
    """Raise ValueError if a drop lies outside an LLM of this many layers."""
    if not cuts or cuts[-1] >= num_layers:
        raise ValueError(
            f"{name} drops before LLM layer {cuts[-1] if cuts else 'None'}, but this LLM has the layers"
            f" 0 to {num_layers - 1}: choose lower ones."
        )
