"""MustDrop: merging in the tower, dual-attention filters inside the LLM, and an aligned KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import Threshold
from ..selection import EncoderMerge, Selection
from ..tokens import EncoderTokens, Needs, PrefillTokens, Segment, TowerInfo, VisualTokens
from .base import Strategy, top_k
from .common.schedule import (
    after_layers,
    check_inside,
    check_layers,
    counts_for,
    head_rows,
    lengths,
    refuse_if_unreachable,
    wanted,
)
from .common.windows import merge_windows, similar_windows, window_cells
from .registry import register


@register(
    "mustdrop",
    summary="Merge similar windows in the tower, filter inside the LLM by total and by largest attention "
    "from the text, then cut the KV cache of earlier layers to the survivors.",
    stages=("encoder", "projector", "prefill", "cache"),
    budget_means="average",
    paper="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model, arXiv "
    "2411.10803",
    code="github.com/liuting20/MustDrop",
    code_licence="Apache-2.0",
    differs="Survivors keep their order on the grid and their positions, a merged window sits at its "
    "centre (the public code puts merged windows first and renumbers, which leaves aligned layers with "
    "wrong distances; positions='renumber' closes gaps and reproduces neither). The budget form of the "
    "filter is exact for the published ratio of thresholds but is ours. Towers without CLS rank by "
    "attention received, towers whose grid is not the LLM's merge after the projector; both are extensions.",
)
@dataclass
class MustDrop(Strategy):
    """Multi-stage vision token dropping (arXiv 2411.10803); each of the three stages can be switched off.

    1. `merging`: after the first tower layer, windows of `window` x `window` patches whose mean pairwise
       cosine is at least `merge_threshold` become one token; of every image of the call equally many. The
       `key_rate` of the tokens with the highest CLS attention in the last tower layer are keys, which no
       filter drops.
    2. `filtering`: after LLM layers 2, 6, 10 and 14 (of 32), with S the attention that a visual token
       receives from all text after it and M the largest from one text token, those with `S <
       global_threshold * sum(S)` and `M < individual_threshold` go. Without thresholds the tokens with the
       highest `max(S / sum(S), M)` stay, as many as the budget, the average over all layers of what a layer
       reads, allows: the same test with both thresholds scaled.
    3. `align_cache`: once the prompt is read, the KV cache from the first filter's layer on keeps only the
        last survivors.

    Args:
        layers: 0-based LLM layers after which to filter.
        global_threshold, individual_threshold: given together, the published form; the budget then is
            ignored. Published pairs for LLaVA-1.5: (0.001, 0.001), (0.0012, 0.001), (0.011, 0.01) for 192,
            128, 64 of 576 tokens.
    """

    merging: bool = True
    window: int = 3
    merge_threshold: Threshold = 0.8
    key_rate: float = 0.08
    filtering: bool = True
    layers: tuple[int, ...] | None = None
    global_threshold: Threshold | None = None
    individual_threshold: Threshold | None = None
    align_cache: bool = True

    static_counts = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers)
        if self.window < 2:
            raise ValueError(f"window must be a whole number of at least 2, found {self.window!r}.")
        if not 0 <= self.key_rate < 1:
            raise ValueError(f"key_rate must lie in [0, 1), found {self.key_rate!r}.")
        if (self.global_threshold is None) != (self.individual_threshold is None):
            raise ValueError("global_threshold and individual_threshold go together: give both or none.")

    @property
    def _thresholds(self) -> tuple[float, float] | None:
        if self.global_threshold is None or self.individual_threshold is None:
            return None
        return self.global_threshold, self.individual_threshold

    @property
    def is_identity(self) -> bool:
        filters = self.filtering and (self._thresholds is None or min(self._thresholds) > 0)
        return not (self.merging or filters) or (self._thresholds is None and super().is_identity)

    # -- stage 1: the vision tower ---------------------------------------------------------------------------
    @property
    def acts_on_projector(self) -> bool:
        return self.merging or (self.filtering and self.key_rate > 0)

    def needs(self, tower: TowerInfo | None) -> Needs:
        if tower is None or not (self.filtering and self.key_rate):
            return Needs()
        if tower.has_cls:
            return Needs(cls_attention=(tower.num_layers - 1,))
        return Needs(received_attention=(tower.global_layers[-1],))

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Upper limit of the tokens per segment that enter the LLM; the picture decides how many merge."""
        return [s.fed for s in segments]

    def encoder_layers(self, tower: TowerInfo) -> tuple[int, ...]:
        return (0,) if self.merging else ()

    def merge_in_encoder(self, tokens: EncoderTokens) -> EncoderMerge | None:
        if tokens.grid is None:
            return None
        return merge_windows(tokens.patches, tokens.grid, self.window, self.merge_threshold, tokens.prefix)

    def select(self, tokens: VisualTokens) -> Selection:
        group = (
            torch.arange(tokens.num_cells, device=tokens.cells.device)
            if tokens.merged is None
            else tokens.merged
        )
        inside = tokens.merged is not None and all(s.shrink == 1 for s in tokens.segments)
        if self.merging and tokens.merged is None:
            group = self._merge_on_grid(tokens, group)
        patches = tokens.patch_rows
        group = group[tokens.cells[patches]]
        owner = torch.arange(len(tokens), device=group.device)
        owner[patches] = patches[self._representatives(tokens, patches, group)]
        keep = owner.unique()
        merges = not inside and len(keep) < len(tokens)
        selection = Selection.merge(keep, owner) if merges else Selection(keep)
        selection.marked = self._keys(tokens, keep)
        return selection

    def _merge_on_grid(self, tokens: VisualTokens, group: Tensor) -> Tensor:
        """The same windows on the cells of the LLM, for towers in which nothing can be merged."""
        place = torch.full((tokens.num_cells,), -1, device=group.device)
        place[tokens.cells[tokens.patch_rows]] = tokens.patch_rows
        group, start = group.clone(), 0
        for segment in tokens.segments:
            cells = window_cells(segment.grid, self.window, group.device) + start
            cells = cells[(place[cells] >= 0).all(1)]
            if len(cells):
                similar = cells[similar_windows(tokens.features[place[cells]]) >= self.merge_threshold]
                group[similar] = similar[:, :1]
            start += segment.size
        return group

    def _representatives(self, tokens: VisualTokens, patches: Tensor, group: Tensor) -> Tensor:
        """For every patch the most central patch of its group, as an index into `patches`."""
        place = torch.cat([_coordinates(s.grid, group.device) for s in tokens.segments])[
            tokens.cells[patches]
        ]
        _, dense = group.unique(return_inverse=True)
        groups = int(dense.max()) + 1 if len(dense) else 0
        size = torch.bincount(dense, minlength=groups)[:, None]
        centre = torch.zeros(groups, 2, device=group.device).index_add_(0, dense, place) / size
        order = ((place - centre[dense]) ** 2).sum(1).sort(stable=True).indices
        order = order[dense[order].sort(stable=True).indices]
        first = size[:, 0].cumsum(0) - size[:, 0]
        return order[first][dense]

    def _keys(self, tokens: VisualTokens, keep: Tensor) -> Tensor | None:
        needs = self.needs(tokens.tower)
        if tokens.tower is None or not (needs.cls_attention or needs.received_attention):
            return None
        if needs.cls_attention:
            scores = tokens.cls_attention(needs.cls_attention[0]).mean(1).flatten()
        else:
            scores = tokens.received_attention(needs.received_attention[0]).flatten()
        marked, segment_of = torch.zeros_like(keep, dtype=torch.bool), tokens.segment_of[keep]
        for i in range(len(tokens.segments)):
            mine = (segment_of == i).nonzero()[:, 0]
            best = top_k(scores[tokens.cells[keep[mine]]], math.ceil(self.key_rate * len(mine)))
            marked[mine[best]] = True
        return marked

    # -- stage 2: the LLM ------------------------------------------------------------------------------------
    def prefill_layers(self, num_layers: int, entering: float = 1.0) -> tuple[int, ...]:
        if not self.filtering or (self._thresholds is not None and min(self._thresholds) <= 0):
            return ()
        if self.layers is None:
            return after_layers((2, 6, 10, 14), num_layers)
        return tuple(i + 1 for i in self.layers)

    def check_depth(self, num_layers: int, entering: float = 1.0) -> None:
        cuts = self.prefill_layers(num_layers)
        if cuts or (self.filtering and self._thresholds is None):
            check_inside(cuts, num_layers, self.info.name)
        if cuts and self._thresholds is None and self.allowance().is_share:
            refuse_if_unreachable(entering, self.budget, lengths(cuts, num_layers), self.info.name)

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        n, device = len(tokens.visual_rows), tokens.visual.device
        marked = torch.zeros(n, dtype=torch.bool, device=device)
        if tokens.marked is not None:
            marked = tokens.marked[tokens.visual_rows]
        if self._thresholds is None:
            count = self._count(tokens, int(marked.sum()))
            if count >= n:
                return Selection.everything(n, device)
        total, largest = torch.zeros(n, device=device), torch.zeros(n, device=device)
        for _, heads in head_rows(tokens, tokens.text_rows):
            rows = heads.mean(0)
            total, largest = total + rows.sum(0), torch.maximum(largest, rows.amax(0))
        if self._thresholds is not None:
            share, single = self._thresholds
            unimportant = (total < share * total.sum()) & (largest < single)
            return Selection((~unimportant | marked).nonzero()[:, 0])
        scores = torch.maximum(total / total.sum(), largest).masked_fill(marked, torch.inf)
        return Selection(top_k(scores, count))

    def _count(self, tokens: PrefillTokens, keys: int) -> int:
        cuts = self.prefill_layers(tokens.num_layers)
        if "counts" not in tokens.memory:
            n, average = len(tokens.visual_rows), wanted(self.budget, tokens)
            spans = lengths(cuts, tokens.num_layers)
            full = [n] * len(cuts)
            tokens.memory["counts"] = (
                full if average >= n else counts_for(n, average, spans, self.info.name, max(1, keys))
            )
        return max(keys, tokens.memory["counts"][cuts.index(tokens.layer)])

    # -- stage 3: the KV cache -------------------------------------------------------------------------------
    def aligned_layers(self, num_layers: int) -> tuple[int, ...]:
        cuts = self.prefill_layers(num_layers)
        return tuple(range(cuts[0] - 1, cuts[-1])) if self.align_cache and cuts else ()


def _coordinates(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(rows * columns, 2) float32, row-major."""
    axes = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
    return torch.cartesian_prod(*axes)
