"""SparseVLM and SparseVLM+: pruning inside the LLM by the attention of words about the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..selection import Selection
from ..tokens import PrefillTokens
from .base import Strategy, top_k
from .common import schedule
from .common.clusters import density_peaks
from .registry import register

# tokens kept of 576 after layers 2, 6 and 15 of 32, by the average they are meant for
TABLES: dict[str, dict[int, tuple[int, ...]]] = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
TABLES["1.0"] = TABLES["1.5"]
PUBLISHED = 576


def recycled(dropped: int) -> int:
    """Merged tokens made of so many dropped ones: a tenth of the best 30 %."""
    return int(int(0.3 * dropped) + 1) // 10 + 1 if dropped else 0


@register(
    "sparsevlm",
    summary="Prune at a few LLM layers by the attention of the words that are about the picture; merge some "
    "of the pruned.",
    stages=("prefill",),
    budget_means="average",
    paper="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, arXiv "
    "2410.04417",
    code="github.com/Gumpest/SparseVLMs",
    code_licence="Apache-2.0",
    differs="Clustering is deterministic: equal densities go to the lower index, the public code adds "
    "noise. Merged tokens sit at the place of their cluster's centre, not after the kept ones. Positions "
    "are kept; the public v1 renumbers and counts on from each layer's cache, which positions='renumber' "
    "does not reproduce: it closes gaps and leaves merged tokens at their places. Version 2.0 takes 14 "
    "heads of 28 or 32 as published, of other numbers the same share. Text between several images rates "
    "only what lies before it. The rotary correction of v2 comes from the model's own tables and is "
    "clamped; the published one turns negative at 1,700 tokens.",
)
@dataclass
class SparseVLM(Strategy):
    """SparseVLM v1.0, v1.5 (arXiv 2410.04417) and SparseVLM+ v2.0 (public code).

    Once, on the embeddings, the text tokens that are more similar to the image than average become raters.
    After LLM layers 2, 6 and 15 (of 32) visual tokens are ranked by the attention that the raters pay them.
    Versions 1 merge the best 30 % of what is dropped, clustered, into a tenth of its number. The budget is
    the average over all layers of what a layer reads; its schedule interpolates the published tables.

    Args:
        version: "1.5", "2.0" (corrects for rotary distance, keeps to priority heads, does not merge), or
            "1.0" (numbers by the rank of the attention, `scale * rank + bias`; the budget is ignored).
        target: 192, 128, 96 or 64: the published numbers for this average of 576 (counted after each layer,
            so that layer 2 counts as pruned already), scaled to the image, instead of the budget.
        layers: 0-based layers after which to prune.
        recycle: merge part of what is dropped; None is what the version does.
        scale, bias: of version "1.0"; 13.5 and 0 are published for 192 tokens, 9 and 6 for 128, 0.8 and 0 for
            64.
        guard: version "2.0": the correction is at least this share of its largest value.
    """

    budget: float | int = 0.3333
    version: Literal["1.5", "2.0", "1.0"] = "1.5"
    target: Literal[192, 128, 96, 64] | None = None
    layers: tuple[int, ...] | None = None
    recycle: bool | None = None
    scale: float = 13.5
    bias: float = 0.0
    guard: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        schedule.check_layers(self.layers)
        if not 0 < self.guard <= 1:
            raise ValueError(f"guard must lie in (0, 1], found {self.guard!r}.")

    @property
    def is_identity(self) -> bool:
        return super().is_identity and self.target is None and self.version != "1.0"

    @property
    def _merges(self) -> bool:
        return self.version != "2.0" if self.recycle is None else self.recycle

    def _cuts(self, num_layers: int) -> tuple[int, ...]:
        published = (2, 6, 15, 19) if self.version == "1.0" else (2, 6, 15)
        if self.layers is None:
            return schedule.after_layers(published, num_layers)
        return tuple(i + 1 for i in self.layers)

    def prefill_layers(self, num_layers: int, entering: float = 1.0) -> tuple[int, ...]:
        return (0, *self._cuts(num_layers))  # 0: the raters are chosen on the embeddings

    def check_depth(self, num_layers: int, entering: float = 1.0) -> None:
        cuts = self._cuts(num_layers)
        schedule.check_inside(cuts, num_layers, self.info.name)
        if self.allowance().is_share and self.target is None and self.version != "1.0":
            schedule.refuse_if_unreachable(
                entering, self.budget, schedule.lengths(cuts, num_layers), self.info.name
            )

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        visual, cuts = tokens.visual_rows, self._cuts(tokens.num_layers)
        n, everything = len(visual), Selection.everything(len(visual), visual.device)
        if tokens.layer == 0:
            tokens.memory["raters"] = tokens.positions[choose_raters(tokens)]
            if self.version != "1.0":
                tokens.memory["counts"] = self._counts(tokens, cuts)
            return everything
        if "counts" in tokens.memory and tokens.memory["counts"][cuts.index(tokens.layer)] >= n:
            return everything
        raters = torch.isin(tokens.positions, tokens.memory["raters"]).nonzero()[:, 0]
        heads, counts = self._attention(tokens, raters)
        scores = (self._priority(heads) if self.version == "2.0" else heads).mean(0) / counts
        if self.version == "1.0":
            matrix = torch.cat([a.mean(0) for _, a in schedule.head_rows(tokens, raters)])
            rank = int(torch.linalg.matrix_rank(matrix))
            if rank == n:
                return everything
            keep = int(max(1, min(self.scale * rank + self.bias, n - 1)))  # the product may be infinite
        else:
            keep = tokens.memory["counts"][cuts.index(tokens.layer)]
        kept = top_k(scores, keep)
        return self._merge(tokens, kept, scores) if self._merges else Selection(kept)

    def _attention(self, tokens: PrefillTokens, raters: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the raters after each visual token (heads, v), and their number (v,), at least 1."""
        visual = tokens.visual_rows
        total = torch.zeros((), device=visual.device)
        for rows, attention in schedule.head_rows(tokens, raters):
            total = total + (
                self._corrected(tokens, rows, attention) if self.version == "2.0" else attention
            ).sum(1)
        later = (raters[:, None] > visual[None]).sum(0)
        if bool((later == 0).any()):  # an image without text after it is rated by the last token
            _, last = next(schedule.head_rows(tokens, tokens.last_row))
            total = torch.where(later == 0, last[:, 0], total)
        return total, later.clamp(min=1).float()

    def _corrected(self, tokens: PrefillTokens, rows: Tensor, attention: Tensor) -> Tensor:
        """Attention divided by what rotary embedding alone gives constant vectors at this distance."""
        if tokens.rotary is None:
            return attention
        cos, sin = (t[..., : t.shape[-1] // 2].float() for t in tokens.rotary)
        visual, half = tokens.visual_rows, cos.shape[-1]
        gravity = 2 / (2 * half) ** 0.5 * (cos[rows] @ cos[visual].mT + sin[rows] @ sin[visual].mT)
        return attention / gravity.clamp(min=self.guard * (2 * half) ** 0.5)

    @staticmethod
    def _priority(heads: Tensor) -> Tensor:
        """The heads that look at the picture most: 14 of 28 or 32, the same share of others."""
        n = len(heads)
        chosen = 14 if n in (28, 32) else max(1, round(n * 14 / 32))
        return heads[top_k(heads.sum(1), chosen)]

    def _merge(self, tokens: PrefillTokens, kept: Tensor, scores: Tensor) -> Selection:
        n = len(scores)
        gone = torch.ones(n, dtype=torch.bool, device=kept.device)
        gone[kept] = False
        dropped = gone.nonzero()[:, 0]
        if not len(dropped):
            return Selection(kept)
        order = scores[dropped].sort(descending=True, stable=True).indices
        best = dropped[order[: min(len(dropped), int(0.3 * len(dropped)) + 1)]]
        states = tokens.hidden_states[tokens.visual_rows[best]]
        centres, cluster = density_peaks(states, min(len(best), recycled(len(dropped))))
        keep = torch.cat([kept, best[centres]]).sort().values
        owner = torch.full((n,), -1, device=kept.device)
        owner[kept] = kept
        owner[best] = best[centres][cluster]
        return Selection.merge(keep, owner)

    # -- numbers ---------------------------------------------------------------------------------------------
    def _counts(self, tokens: PrefillTokens, cuts: tuple[int, ...]) -> list[int]:
        """Kept tokens at every cut, merged ones not counted."""
        n = len(tokens.visual_rows)
        if self.target is not None:
            return self._resample([round(k * n / PUBLISHED) for k in TABLES[self.version][self.target]], cuts)
        average, spans = schedule.wanted(self.budget, tokens), schedule.lengths(cuts, tokens.num_layers)
        if average >= n:
            return [n] * len(cuts)
        schedule.refuse_if_unreachable(n, average, spans, self.info.name)
        share = schedule.bisect(lambda x: self._read(n, self._kept(n, x, cuts), spans), average)
        counts = self._kept(n, share, cuts)
        after = self._after(n, counts)
        before = after[-2] if len(after) > 1 else n
        left = schedule.last_count(n, after, average, spans)
        counts[-1] = next(
            (k for k in range(left, 0, -1) if k + self._extra(before - k) <= left), max(1, min(before, left))
        )
        return counts

    def _kept(self, n: int, share: float, cuts: tuple[int, ...]) -> list[int]:
        """The published tables, linear in between: of n tokens with an average of `share * n`."""
        rows = {t / PUBLISHED: k for t, k in TABLES[self.version].items()} | {
            0.0: (0, 0, 0),
            1.0: (PUBLISHED,) * 3,
        }
        targets = sorted(rows)
        high = next(t for t in targets if t >= share)
        low = targets[max(0, targets.index(high) - 1)]
        x = (share - low) / (high - low) if high > low else 0.0
        table = [(a + x * (b - a)) / PUBLISHED * n for a, b in zip(rows[low], rows[high], strict=True)]
        return [max(1, round(k)) for k in self._resample(table, cuts)]

    @staticmethod
    def _resample(table: list, cuts: tuple[int, ...]) -> list:
        """Three published numbers for fewer or more cuts: the nearest of the same relative place."""
        last = max(1, len(cuts) - 1)
        return [table[round(i * (len(table) - 1) / last)] for i in range(len(cuts))]

    def _extra(self, dropped: int) -> int:
        return recycled(dropped) if self._merges else 0

    def _after(self, n: int, counts: list[int]) -> list[int]:
        out = []
        for k in counts:
            k = min(k, n)
            n = min(n, k + self._extra(n - k))
            out.append(n)
        return out

    def _read(self, n: int, counts: list[int], spans: list[int]) -> float:
        """Average over the layers of what each reads."""
        return sum(span * k for span, k in zip(spans, [n, *self._after(n, counts)], strict=True)) / sum(spans)


def choose_raters(tokens: PrefillTokens, chunk: int = 512) -> Tensor:
    """(r,) int64: text tokens with an above-mean share of the visual tokens' products; all if none has."""
    text = tokens.text_rows
    words = tokens.hidden_states[text].float()
    total = torch.zeros(len(text), device=words.device)
    for rows in tokens.visual_rows.split(chunk):
        total += (tokens.hidden_states[rows].float() @ words.mT).softmax(-1).sum(0)
    chosen = total > total.mean()
    return text[chosen] if bool(chosen.any()) else text
