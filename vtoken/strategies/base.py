"""Base class of strategies: a dataclass of hyper-parameters with one method to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import ClassVar, Literal

from torch import Tensor

from ..selection import EncoderMerge, Selection
from ..sparse_attention import AttentionTokens, SparseAttention
from ..storage import Storage
from ..streams import PixelReuse, Reuse
from ..temporal import Temporal
from ..tokens import EncoderTokens, Needs, PrefillTokens, Segment, TowerInfo, VisualTokens
from .budgets import Budget
from .checked_options import CheckedOptions
from .info import StrategyInfo

Positions = Literal["original", "renumber"]
REFERENCE_DEPTH = 32  # of the LLMs for which layer numbers are published; deep enough for every method


@dataclass
class Strategy(CheckedOptions):
    """Base of all strategies: subclass it as a dataclass, register it, write `select`.

    Override:
        select: the method itself, for one image or one video between the tower and the LLM.
        needs: what it reads besides the features. Default: nothing.
        counts: tokens kept per segment, from the grids alone; set `static_counts = False` if thresholds
            decide, `segments_compete = True` if the grids tell the sum alone.
        prefill_layers, select_in_prefill: for methods that drop inside the LLM.
        aligned_layers: for methods that shrink the KV cache of earlier layers once the prompt has been read.
        encoder_layers, merge_in_encoder: for methods that merge after layers of an encoder; `EncoderStrategy`
            is for those between attention and MLP.
        attention, attend: for methods whose LLM layers attend to tokens of their own choice.
        storage: for methods that hold the LLM's KV cache in a form of their own.
        reuse: for methods that compute a part of a frame in the vision tower and reuse it or an earlier one.

    Args:
        budget: a float in (0, 1] is the share of the visual tokens that the unpatched model would feed to the
            LLM; an int is a number of tokens per image or per frame. 1.0 is the unpatched model, bit for bit.
        positions: "original" keeps the position ids of the kept tokens, "renumber" closes the gaps as the
            code of many papers does (1-D RoPE only).

    Values are checked against the annotations of the fields, see `vtoken.checks.fit`, and by `__post_init__`:
    when the object is made and at every later assignment, after which it is what it would be had it been made
    with that value. For that `__post_init__` can run more than once.

    Raises:
        ValueError: for a value of another type than its field's, or out of range.
    """

    budget: float | int = 0.2
    _: KW_ONLY
    positions: Positions = "original"

    info: ClassVar[StrategyInfo]
    static_counts: ClassVar[bool] = True
    segments_compete: ClassVar[bool] = False

    @property
    def is_identity(self) -> bool:
        """Whether the model would read exactly what it reads unpatched."""
        return self.budget is not None and self.allowance().is_all

    def allowance(self, budget: float | int | None = None) -> Budget:
        """The budget, or the one given in its place, as tokens; all without one. ValueError if wrong."""
        budget = self.budget if budget is None else budget
        return Budget(1.0 if budget is None else budget)

    def needs(self, tower: TowerInfo | None) -> Needs:
        """Inputs that `select` reads in addition to features, segments and cells."""
        return Needs()

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        """Tokens per segment that enter the LLM, from the grids alone: all if the method acts inside it."""
        allowance = self.allowance(budget)
        return allowance.tokens(segments) if self.acts_on_projector else [s.fed for s in segments]

    def total(
        self, segments: Sequence[Segment], separators: int = 0, budget: float | int | None = None
    ) -> int | None:
        """Number of tokens of one image or one video that enter the LLM, known before it is encoded.

        A server needs it: it reserves places in the prompt before the vision tower runs.

        Args:
            segments: the grids; of a modality that `needs` names.
            separators: tokens that belong to no cell, such as image-newline rows; counted in the result.
            budget: in place of the strategy's own.

        Returns:
            Exactly the length of what `select` keeps, or None where the picture decides it.

        Raises:
            ValueError: for a budget that is none.
        """
        own = self if budget is None else self.with_budget(budget)
        if own.is_identity or not own.acts_on_projector:
            return sum(s.fed for s in segments) + separators
        return own._total_kept(segments, separators)

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int | None:
        """`total` under the strategy's own budget, below 1.0: override it if `counts` does not tell."""
        return self.ceiling(segments, separators) if self.static_counts else None

    def ceiling(self, segments: Sequence[Segment], separators: int = 0) -> int:
        """The sum of `counts`, and the separators that stay: a number to announce where `total` is None."""
        return sum(self.counts(segments)) + (separators if getattr(self, "keep_newline", False) else 0)

    def per_segment(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int] | None:
        """Tokens of each segment that enter the LLM, for servers, where text stands between frames.

        Args:
            segments: the grids; of a modality that `needs` names.
            budget: in place of the strategy's own.

        Returns:
            Exactly the numbers that `select` keeps of an item without separators, or None where the picture
            decides them.

        Raises:
            ValueError: for a budget that is none.
        """
        own = self if budget is None else self.with_budget(budget)
        if own.is_identity or not own.acts_on_projector:
            return [s.fed for s in segments]
        return own._kept_per_segment(segments)

    def _kept_per_segment(self, segments: Sequence[Segment]) -> list[int] | None:
        """`per_segment` under the strategy's own budget, below 1.0: override it if `counts` does not tell."""
        total = self._total_kept(segments, 0)
        if total is None or len(segments) == 1:
            return None if total is None else [total]
        return self.counts(segments) if self.static_counts and not self.segments_compete else None

    def select(self, tokens: VisualTokens) -> Selection:
        """Choose among the visual tokens of one image or one video."""
        raise NotImplementedError(f"{type(self).__name__} does not act between the vision tower and the LLM.")

    def prefill_layers(self, num_layers: int, entering: float = 1.0) -> tuple[int, ...]:
        """Ascending LLM layers before which `select_in_prefill` is asked; empty for projector strategies.

        Args:
            num_layers: of the LLM.
            entering: share of the visual tokens that a projector strategy of the same combination lets into
                the LLM; `tokens.entering` in `select_in_prefill`.
        """
        return ()

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        """Choose among the tokens `tokens.visual_rows` of one prompt before LLM layer `tokens.layer`."""
        raise NotImplementedError(f"{type(self).__name__} does not act inside the LLM.")

    def aligned_layers(self, num_layers: int) -> tuple[int, ...]:
        """LLM layers whose KV cache keeps only what survived the last drop, once the prompt has been read."""
        return ()

    def attention(self) -> SparseAttention | None:
        """Attention of LLM layers to the tokens that `attend` chooses; None for attention to all."""
        return None

    def attend(self, tokens: AttentionTokens) -> Selection:
        """Choose, of one prompt, the tokens that pass the attention of LLM layer `tokens.layer`.

        The last token passes in any case, and so do tokens after the prompt.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves the LLM's attention as it is.")

    def storage(self, num_layers: int) -> Storage | None:
        """Form in which the LLM's KV cache holds the tokens; None for the cache as it is."""
        return None

    def encoder_layers(self, tower: TowerInfo) -> tuple[int, ...]:
        """Ascending tower layers in which `merge_in_encoder` is asked; empty if nothing merges there."""
        return ()

    def merge_in_encoder(self, tokens: EncoderTokens) -> EncoderMerge | None:
        """Merge tokens in a layer, of every sequence equally many; None leaves them."""
        raise NotImplementedError(f"{type(self).__name__} does not act inside the vision tower.")

    def reuse(self, tower: TowerInfo) -> Reuse | PixelReuse | None:
        """Reuse in the vision tower; None for methods that compute every frame in full."""
        return None

    def temporal(self, tower: TowerInfo) -> Temporal | None:
        """Attention across frames in the vision tower; None for methods that leave frames apart."""
        return None

    def with_budget(self, budget: float | int) -> Strategy:
        """The same strategy under another budget; itself if it has none."""
        return replace(self, budget=budget) if self.takes_budget() else self

    @classmethod
    def takes_budget(cls) -> bool:
        """Whether the method has a budget."""
        return cls.__dataclass_fields__["budget"].init

    def check_depth(self, num_layers: int, entering: float = 1.0) -> None:
        """Raise ValueError if the method cannot serve an LLM of this many layers with this budget."""

    def describe(self) -> str:
        """`name(option=value, ...)` with the options that differ from their defaults, and the budget."""
        options = [] if self.budget is None else [f"budget={Budget(self.budget)}"]
        for f in fields(self):
            if f.init and f.name != "budget" and getattr(self, f.name) != f.default:
                options.append(f"{f.name}={getattr(self, f.name)!r}")
        return f"{self.info.name}({', '.join(options)})"

    def budget_counts(self) -> str:
        """Unit of the budget, in words; empty where the registration does not tell."""
        return self.info.budget_counts

    @property
    def in_encoder(self) -> Strategy:
        """The strategy that acts inside the vision tower: itself, or that part of a combination."""
        return self

    @property
    def acts_inside(self) -> bool:
        """Whether it drops inside the LLM."""
        return bool(self.prefill_layers(REFERENCE_DEPTH))

    @property
    def acts_on_projector(self) -> bool:
        return type(self).select is not Strategy.select

    @property
    def acts_on_cache(self) -> bool:
        """Whether it holds the LLM's KV cache in a form of its own."""
        return type(self).storage is not Strategy.storage

    @property
    def acts_in_attention(self) -> bool:
        """Whether LLM layers attend to tokens of its choice."""
        return self.attention() is not None

    @property
    def acts_between_frames(self) -> bool:
        """Whether it reuses in the vision tower what was computed for an earlier frame or another place."""
        return type(self).reuse is not Strategy.reuse


def top_k(scores: Tensor, k: int) -> Tensor:
    """Ascending indices of the k largest scores of a 1-D tensor; among equals the lower index wins."""
    order = scores.sort(descending=True, stable=True).indices
    return order[:k].sort().values
