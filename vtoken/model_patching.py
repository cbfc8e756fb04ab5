"""What a strategy puts on a vision-language model: the hooks of one patch and how they ask the strategy."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .active import Patches
from .adapters.base import Adapter
from .fit import check_fit, design_of, fitting
from .gate import Gate
from .hooks import Wrapped
from .kernels import gather_merge
from .mechanism.added_modules import AddedModule
from .mechanism.entrance_hooks import EntranceHooks
from .mechanism.forward_context import ENCODED, ForwardContext
from .mechanism.generation import generating
from .mechanism.layer_hooks import LayerHooks
from .mechanism.planner import Chosen, Planner
from .mechanism.prompt import EncodedVisuals
from .mechanism.text_reading import TextReading
from .mechanism.unread_features import Unread
from .mechanism.vision_hooks import VisionHooks
from .mechanism.visual_turn import VisualTurn
from .recorder import Recorder
from .selection import Selection, concat_selections
from .strategies import Strategy
from .strategies.registry import modalities_of
from .strategies.trained import trained_part
from .temporal import Temporal
from .tokens import Segment, VisualTokens
from .trained_weights import make_module


class Patch:
    """Everything that one `patch` or `applied` put on a model; `patches` tells which calls use it."""

    def __init__(self, adapter: Adapter, strategy: Strategy, patches: Patches) -> None:
        check_fit(adapter, strategy)
        self.adapter, self.strategy = adapter, strategy
        self.context, self.gate = ForwardContext(), Gate(patches, self)
        self.warned = False
        self.sessions: int | None = None  # number of sessions that use a patch made by sessions
        self.unread = None if strategy.is_identity else Unread(strategy.info.name)
        self.design = design_of(adapter, strategy, len(getattr(adapter.decoder, "layers", ())))
        self.recorder = Recorder(adapter.model, adapter.decoder.config, self.design.schedule)
        self.wrapped = Wrapped()
        self.parts: list[Any] = [self.wrapped]
        self.trained = trained_part(strategy)
        try:
            self._add_module()
            vision = self._vision_hooks()
            self.parts.append(vision)
            self.parts.append(EntranceHooks(adapter, self._turn(), self.unread, vision.read))
            if hasattr(adapter.model, "generate"):
                self.wrapped.wrap(adapter.model, "generate", self._generate)
        except BaseException:
            self.remove()
            raise

    def _add_module(self) -> None:
        """Put the weights of a strategy that has some on the model."""
        part = self.trained
        if part is None:
            return
        if part.attached:
            raise ValueError(
                f"This {type(part).__name__} object is on another model: give each model one of its own."
            )
        module = make_module(self.adapter, part)
        self.parts.append(AddedModule(self.adapter.model, module))
        part.attach(module)

    def _vision_hooks(self) -> VisionHooks:
        design, strategy = self.design, self.strategy
        return VisionHooks(
            self.adapter,
            design.needs,
            self.context,
            self.gate,
            self.recorder.timer,
            design.merging,
            (lambda: strategy.in_encoder) if design.merging else None,
            design.reuse,
            self.recorder.used,
            None if design.wants_text else self._ask,
            None if self.unread is None else self.unread.note,
            {m: functools.partial(self._temporal, m) for m in design.temporal},
        )

    def _temporal(self, modality: str) -> Temporal:
        """The strategy's attention across frames, with its present options."""
        made = self.strategy.temporal(self.adapter.towers[modality].info)
        assert made is not None
        return made

    def _turn(self) -> VisualTurn:
        adapter, design, context = self.adapter, self.design, self.context
        schedule, positions = design.schedule, design.positions
        inside = schedule.inside or design.storage is not None
        planner = Planner(
            adapter, self._select, context, self._chosen, self._text_reading(), inside, design.together
        )
        select = self.strategy.select_in_prefill
        adapt = self._adapt if schedule.hides else None
        attend = self.strategy.attend if schedule.sparse is not None else None
        layers = LayerHooks(adapter.decoder, schedule, select, context, positions, adapt, attend)
        given = positions, context, self.gate, self.recorder, design.storage
        return VisualTurn(adapter, planner, layers, *given)

    def _text_reading(self) -> TextReading | None:
        if not self.design.wants_text:
            return None
        needs = self.design.needs.values()
        fuse = self._fuse if self.design.fuses_text else None
        depths = (n.question_attention for n in needs if n.question_attention is not None)
        question = any(n.question for n in needs)
        return TextReading(self.adapter.decoder, question, fuse, next(depths, None), self.recorder.read)

    def _fuse(self, embeddings: Tensor, visual: Tensor) -> Tensor:
        assert self.trained is not None
        return self.trained.fuse_text(embeddings, visual)

    def _adapt(self, layer: int, hidden: Tensor) -> Tensor:
        assert self.trained is not None
        return self.trained.adapt(layer, hidden)

    def __repr__(self) -> str:
        return f"<vtoken patch {self.strategy.describe()} of a {type(self.adapter.model).__name__}>"

    def remove(self) -> None:
        """Take all hooks off the model."""
        for part in self.parts:
            part.remove()
        if self.trained is not None:
            self.trained.attach(None)

    def check(self) -> None:
        """Raise RuntimeError if an option has been assigned since that needs other hooks."""
        part = trained_part(self.strategy)
        if part is not None and self.trained is not None and part is not self.trained:
            part.share(self.trained)  # a combination makes its parts anew for another budget
            self.trained = part
        if part is not None:
            part.check_built()
        if design_of(self.adapter, self.strategy, self.design.schedule.layers) != self.design:
            raise RuntimeError(
                f"{self.strategy.info.name} was given options after it was patched that need other hooks on"
                " the model: call vtoken.unpatch(model) and vtoken.patch(model, strategy) again."
            )

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.gate.call() as served:
            if not served:
                return original(*args, **kwargs)
            self.context.unread = False
            out = generating(self.context, original, *args, **kwargs)
            if self.context.unread and self.unread is not None and not self.gate.disabled():
                self.unread.warn()
            return out

    def encode(self, output: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that a session keeps of the frames in an output of `get_*_features`.

        Args:
            output: an output of this patched model.
            rows: (n, d) its visual tokens.

        Returns:
            (m,) int64, ascending: the kept tokens; and (m, d): their features, absorbed tokens added.
        """
        encoded: EncodedVisuals | None = getattr(output, ENCODED, None)
        if encoded is None or self.context.disabled:
            return torch.arange(len(rows), device=rows.device), rows
        picks = encoded.picks or [self._select(item) for item in encoded.items]
        selection = concat_selections(picks, [len(item) for item in encoded.items])
        keep = selection.keep.to(rows.device)
        if selection.features is not None:
            return keep, selection.features.to(rows)
        into, weight = selection.into, selection.weight
        if into is None or weight is None:
            return keep, rows[keep]
        return (
            keep,
            gather_merge(rows[None], keep[None], into[None].to(rows.device), weight[None].to(rows.device))[0],
        )

    def _select(self, tokens: VisualTokens) -> Selection:
        """The strategy's answer on a copy of the stream's memory, so that the next answer is the same."""
        with nullcontext() if self.trained is not None else torch.no_grad():
            return self._ask(replace(tokens, memory=copy.deepcopy(tokens.memory)))

    def _ask(self, tokens: VisualTokens) -> Selection:
        if tokens.modality not in self.strategy.needs(tokens.tower).modalities:
            fit = ", ".join(n for n in fitting(self.adapter) if tokens.modality in modalities_of(n))
            raise ValueError(
                f"{self.strategy.info.name} is not defined for {tokens.modality} input, which this prompt"
                f" has: use {fit}."
            )
        self._warn_of_one_token(tokens)
        self._warn_of_new_weights()
        if self.strategy.is_identity or not self.strategy.acts_on_projector:
            return Selection.everything(len(tokens), tokens.cells.device)
        try:
            return self.strategy.select(tokens).check(len(tokens))
        except ValueError as error:
            seen = [tokens.features, tokens.question_attention]
            if all(x is None or bool(x.isfinite().all()) for x in seen):
                raise
            raise ValueError(
                f"{self.strategy.info.name} chooses by features of visual tokens, or by what the question"
                " looks at, that are not finite numbers: load the model in bfloat16 or float32 if it is in"
                " float16, and look for such numbers in its weights and pixels."
            ) from error

    def _warn_of_new_weights(self) -> None:
        """Warn once if a model answers with weights that were never trained."""
        part = self.trained
        if part is None or self.warned or torch.is_grad_enabled() or part.is_identity or not part.untrained:
            return
        self.warned = True
        warnings.warn(
            f"The weights of {part.info.name} are new: train them, or patch with"
            " vtoken.VTokenConfig.from_pretrained(folder) of trained ones.",
            stacklevel=2,
        )

    def _warn_of_one_token(self, tokens: VisualTokens) -> None:
        """Warn once if a budget of 1, one token, may have been meant as 1.0, all tokens."""
        parts = getattr(self.strategy, "ordered", [self.strategy])
        dropping = [p.budget for p in parts if p.acts_on_projector or p.acts_inside or p.acts_on_cache]
        most = _largest(tokens.segments)
        if not self.warned and most > 16 and any(type(b) is int and b == 1 for b in dropping):
            self.warned = True
            warnings.warn(
                f"budget=1 leaves one of the {most} visual tokens of an image or frame: write budget=1.0 to"
                " keep them all.",
                stacklevel=2,
            )

    def _chosen(self, chosen: list[Chosen], beams: int) -> None:
        # with the strategy's present options
        self.recorder.describe, self.recorder.budget_counts = (
            self.strategy.describe(),
            self.strategy.budget_counts(),
        )
        self.recorder.chosen(chosen, beams)
        budget = self.strategy.budget
        if isinstance(budget, int) and not self.warned:
            # a whole number counts per frame of a video, and per image with all its crops
            most = max((_largest(c.tokens.segments) for c in chosen), default=budget)
            if budget > most:
                self.warned = True
                warnings.warn(
                    f"The budget of {budget} tokens is larger than the {most} visual tokens there are: all"
                    " are kept.",
                    stacklevel=2,
                )


def _largest(segments: tuple[Segment, ...]) -> int:
    frames = [s.fed for s in segments if s.kind == "frame"]
    return max(frames) if frames else sum(s.fed for s in segments)
