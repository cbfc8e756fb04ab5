"""One strategy as a server needs it: the number of kept tokens is known before anything is encoded."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...adapters.base import Adapter, Layout
from ...config import VTokenConfig
from ...fit import check_fit, fitting, needs_of
from ...kernels import gather_merge
from ...requested import make_strategy
from ...strategies import Strategy, strategy_info
from ...strategies.scored import ScoredStrategy
from ...strategies.trained import trained_part
from ...tokens import Needs, Segment, VisualTokens
from .geometry import Geometry
from .positions import extent

BUDGET = "vtoken_budget"  # a request's own budget, among its mm_processor_kwargs
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}  # names of a processor's outputs
MODALITIES = tuple(PIXELS)
LEAST, MOST = 1e-6, 2**31  # budgets of requests


def field_of(modality: str) -> str:
    """The name under which an item's `Announced` travels from the processor to the model."""
    return f"vtoken_{modality}"


@dataclass(frozen=True)
class Announced:
    """What the front end has decided about one image or video.

    Attributes:
        tokens: before anything is dropped.
        kept: those that enter the LLM.
        extent: positions that it takes, kept or not.
        budget: the one that led to it; None if nothing is dropped.
        parts: kept tokens and extent of every segment, where text stands between them.
    """

    tokens: int
    kept: int
    extent: int
    budget: float | int | None = None
    parts: tuple[tuple[int, int], ...] = ()

    def row(self) -> Tensor:
        """(5 + 2 * parts,) int64, which no change of dtype on the way can round."""
        share = isinstance(self.budget, float)
        value = struct.unpack("<q", struct.pack("<d", self.budget))[0] if share else self.budget or 0
        parts = [number for part in self.parts for number in part]
        return torch.tensor([self.tokens, self.kept, self.extent, int(share), value, *parts])

    @classmethod
    def of(cls, row: Tensor) -> Announced:
        """What `row` wrote."""
        tokens, kept, reach, share, value, *parts = row.tolist()
        budget = struct.unpack("<d", struct.pack("<q", value))[0] if share else value or None
        return cls(tokens, kept, reach, budget, tuple(zip(parts[::2], parts[1::2], strict=True)))

    def runs(self) -> tuple[tuple[int, int], ...]:
        """Tokens and extent of every run of placeholders."""
        return self.parts or ((self.kept, self.extent),)


class Reduction:
    """The strategy that a configuration asks for, on its model.

    Args:
        config: of the model, with the fields of a `VTokenConfig` under `vtoken`; without them nothing is
            dropped.
        geometry: of the model, made from the configuration if None.

    Raises:
        ValueError: in one sentence, for a strategy that does not fit the model or cannot be served.
    """

    idle: ClassVar[str] = "uniform"

    def __init__(self, config: Any, geometry: Geometry | None = None) -> None:
        told = getattr(config, "vtoken", None)
        self.asked = told is not None
        self.geometry = Geometry(config) if geometry is None else geometry
        wanted = VTokenConfig(self.idle, 1.0) if told is None else VTokenConfig.from_dict(told)
        self.strategy: Strategy = make_strategy(wanted, None, {})
        adapter = self.geometry.adapter
        check_fit(adapter, self.strategy, servable)
        s = self.strategy
        if s.is_identity and self.asked and s.budget == 1.0:
            s = s.with_budget(0.5)  # as a request may ask
        if not s.is_identity and (why := why_not(adapter, s)):
            raise ValueError(
                f"{s.info.name} {why}, which vLLM cannot do: use {', '.join(servable(adapter))}, or"
                " vtoken.patch on the transformers model."
            )

    def needs(self, modality: str) -> Needs:
        """What the strategy reads of this modality; nothing if it keeps everything."""
        return needs_of(self.geometry.adapter, self.strategy, modality)

    def announce(self, modality: str, layout: Layout, positions: Tensor, budget: Any = None) -> Announced:
        """What will stay of one image or video.

        Args:
            positions: (3, n), see `Geometry.positions`.
            budget: the request's own, None for that of the strategy.

        Raises:
            ValueError: for a budget that is none, or a strategy that cannot tell.
        """
        if modality in self.geometry.alone:
            return self._announce_alone(layout, positions, budget)
        strategy, n = self._with(budget), len(layout.cells)
        whole = strategy.is_identity or modality not in self.needs(modality).modalities
        if modality in self.geometry.apart:
            return self._announce_parts(modality, layout, positions, None if whole else strategy)
        if whole:
            return Announced(n, n, extent(positions))
        separators = int((layout.cells < 0).sum())
        kept = strategy.total(layout.segments, separators)
        if kept is None:
            if not isinstance(strategy, ScoredStrategy):
                raise ValueError(
                    f"{strategy.info.name} cannot tell how many tokens it keeps of this {modality} before"
                    " it is encoded, which vLLM needs: use another strategy."
                )
            kept = strategy.ceiling(layout.segments, separators)
        return Announced(n, max(1, min(n, kept)), extent(positions), strategy.budget)

    def _announce_parts(
        self, modality: str, layout: Layout, positions: Tensor, strategy: Strategy | None
    ) -> Announced:
        """`announce` where text stands between the segments; `strategy` is None if everything stays."""
        sizes = [s.fed for s in layout.segments]
        counts = sizes if strategy is None else strategy.per_segment(layout.segments)
        if counts is None or not all(counts):
            why, instead = "would keep no token", "a larger budget"
            if counts is None:
                why, instead = "cannot tell how many tokens it keeps", "another strategy"
            raise ValueError(
                f"{self.strategy.info.name} {why} of every part of this {modality}, which vLLM needs where"
                f" text stands between them: use {instead}, or serve no {modality} with"
                f" limit_mm_per_prompt={{'{modality}': 0}}."
            )
        reach = [extent(p) for p in positions.split(sizes, 1)]
        budget = None if strategy is None else strategy.budget
        parts = tuple(zip(counts, reach, strict=True))
        return Announced(sum(sizes), sum(counts), sum(reach), budget, parts)

    def _announce_alone(self, layout: Layout, positions: Tensor, budget: Any) -> Announced:
        """`announce` where every segment is an image to the strategy."""
        sizes = [s.fed for s in layout.segments]
        told = [
            self.announce("image", Layout.plain([segment], positions.device), place, budget)
            for segment, place in zip(layout.segments, positions.split(sizes, 1), strict=True)
        ]
        parts = tuple((one.kept, one.extent) for one in told)
        kept, reach = (sum(numbers) for numbers in zip(*parts, strict=True))
        return Announced(sum(sizes), kept, reach, told[0].budget, parts)

    def choose(self, tokens: VisualTokens, announced: Announced) -> tuple[Tensor, Tensor | None]:
        """The kept features (k, d), and the places of the kept tokens, (k,) int64; None for all."""
        if tokens.modality not in self.geometry.alone:
            return self.choose_one(tokens, announced)
        features, places, start = [], [], 0
        for i, (segment, (kept, reach)) in enumerate(zip(tokens.segments, announced.parts, strict=True)):
            cells = torch.arange(segment.fed, device=tokens.cells.device)
            read = tokens.features[start : start + segment.fed]
            values: dict[Any, Any] = {key: tokens._get(*key)[i : i + 1] for key in tokens.provided}
            one = VisualTokens(read, (segment,), cells, tokens.tower, "image", provided=values)
            some, keep = self.choose_one(one, Announced(segment.fed, kept, reach, announced.budget))
            features.append(some)
            places.append(start + (cells if keep is None else keep))
            start += segment.fed
        return torch.cat(features), torch.cat(places)

    def choose_one(self, tokens: VisualTokens, announced: Announced) -> tuple[Tensor, Tensor | None]:
        """`choose` for what the strategy sees at once."""
        n = len(tokens)
        if announced.kept >= n or announced.budget is None:
            return tokens.features, None
        selection = self._with(announced.budget).select(tokens).check(n)
        parts = tokens.segment_of if announced.parts else None
        selection = selection.exactly([count for count, _ in announced.runs()], n, parts)
        if selection.features is not None:
            return selection.features.to(tokens.features), selection.keep
        return gather_merge(tokens.features, selection.keep, selection.into, selection.weight), selection.keep

    def _with(self, budget: Any) -> Strategy:
        if budget is not None and not self.asked:
            raise ValueError(
                f"This model is served without a strategy, so {BUDGET} has no meaning: start it with the"
                " overrides of vtoken.integrations.vllm."
            )
        if budget is None:
            return self.strategy
        made = self.strategy.with_budget(budget)
        # vLLM's hash of a request reads the bytes of a number and not its type: ranges that share none
        if (isinstance(made.budget, float) and made.budget < LEAST) or (
            isinstance(made.budget, int) and made.budget > MOST
        ):
            raise ValueError(
                f"A request's budget is a share of at least {LEAST} or a number of tokens up to {MOST}, found"
                f" {made.budget}."
            )
        return made


def why_not(adapter: Adapter, strategy: Strategy) -> str:
    """What a strategy does that a server with a paged KV cache and an encoder cache cannot do, in words."""
    if trained_part(strategy) is not None:
        return "has weights of its own"
    if strategy.acts_inside or strategy.acts_in_attention:
        return "drops tokens inside the LLM"
    if strategy.acts_on_cache:
        return "holds the LLM's KV cache in a form of its own"
    if strategy.acts_between_frames:
        return "reuses tokens inside the vision tower"
    if any(strategy.encoder_layers(tower.info) for tower in adapter.towers.values()):
        return "merges tokens inside the vision tower"
    needs = [needs_of(adapter, strategy, modality) for modality in MODALITIES]
    if any(n.text for n in needs):
        return "reads the question"
    if any(n.states for n in needs):
        return "reads outputs of tower layers"
    if any(n.pixels or n.together for n in needs):
        return "reads all images of a prompt together"
    if not isinstance(strategy, ScoredStrategy) and strategy.total([Segment("image", (8, 8))]) is None:
        return "lets the picture decide how many tokens stay"
    return ""


def servable(adapter: Adapter) -> list[str]:
    """Names of the strategies that serve a model in vLLM."""
    return [name for name in fitting(adapter) if not why_not(adapter, strategy_info(name).cls())]
