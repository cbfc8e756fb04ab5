"""Put a strategy on a model (`patch`, `applied`), take it off, and report on its calls."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .accounting import EncoderReport, Report
from .active import LOCK, Patches, patches_for, patches_of
from .adapters.base import Adapter
from .adapters.encoders.encoder import encoder_for
from .adapters.registry import model_of
from .encoder_patching import EncoderPatch
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
from .requested import requested
from .selection import Selection, concat_selections
from .strategies import Strategy
from .strategies.registry import modalities_of
from .strategies.trained import trained_part
from .temporal import Temporal
from .tokens import Segment, VisualTokens
from .trained_weights import make_module

M = TypeVar("M")


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


def patch(
    model: M,
    strategy: Any = None,
    budget: float | int | None = None,
    *,
    adapter: str | type[Adapter] | None = None,
    **options: Any,
) -> M:
    """Make a Hugging Face vision-language model read fewer visual tokens, in place.

    Args:
        model: an unmodified transformers model, or what holds exactly one: wrappers of torch and peft, value
            heads, embedding heads (docs/patching.md).
        strategy: a name (`vtoken.list_strategies()`), a `vtoken.strategies` object or a `VTokenConfig`; or
            "visionzip+fastv" or the list ["visionzip", "fastv"], a projector strategy and one that drops
            inside the LLM, under one budget. None for "farcover", with relevance=0 where the LLM's layers
            cannot tell what the question looks at.
        budget: share of the visual tokens in (0, 1], or a whole number of tokens per image or frame; the
            strategy's default if None.
        adapter: None for the one of the model's type; "generic" for a type that has none; or a subclass of
            `vtoken.adapters.base.Adapter`.
        options: further hyper-parameters of the strategy; of several, one mapping per name, as in
            `fastv={"layer": 3}`, and `split`, see `vtoken.strategies.Composite`.

    Returns:
        The model itself.

    Raises:
        TypeError: if the model or the strategy is no such thing.
        ValueError: for an unknown strategy, a value of a wrong type or out of range, a model without adapter,
            a strategy that does not fit it, or a model that is patched already.
    """
    made, target = requested(model, strategy, budget, adapter, options)
    with patches_for(target.model, getattr(target, "trunk", None)) as patches:
        check_unpatched(patches, target)
        new = _make_patch(target, made, patches)
        with LOCK:
            try:
                check_unpatched(patches, target)  # another thread may have been faster
                patches.put(new)
            except BaseException:
                new.remove()
                raise
    return model


def _make_patch(target: Any, strategy: Strategy, patches: Patches) -> Any:
    return (Patch if isinstance(target, Adapter) else EncoderPatch)(target, strategy, patches)


def check_unpatched(patches: Patches, adapter: Adapter) -> None:
    """Raise ValueError if a model has a patch."""
    current = cast("Patch | None", patches.current(calls=False))
    if current is None:
        return
    name, other = current.strategy.info.name, current.adapter.model
    if other is not adapter.model:
        raise ValueError(
            f"The {type(other).__name__} that shares its modules with this {type(adapter.model).__name__} is"
            f" patched with {name} already: a patch on either serves both, call vtoken.unpatch first to"
            " replace it."
        )
    raise ValueError(
        f"This model is patched with {name} already: call vtoken.unpatch(model) first, or use "
        "`with vtoken.applied(model, ...)` to replace it for a while."
    )


def unpatch(model: M) -> M:
    """Take the patch off; a model that is not patched stays as it is. Returns the model.

    Calls of other threads that use the patch finish with it; its hooks go when the last of them has ended.
    Inside a `vtoken.applied` block the patch of this block is taken off.

    Raises:
        RuntimeError: if another thread is inside `with vtoken.applied(...)` of this model, and this one is
            not.
    """
    patches = patches_of(model_of(model))
    if patches is not None:
        patches.take_off()
    return model


def patch_of(model: Any) -> Patch | None:
    """The patch that a call of the model would use here, None if there is none."""
    patches = patches_of(model_of(model))
    return None if patches is None else cast("Patch | None", patches.current())


@contextmanager
def applied(
    model: M,
    strategy: Any = None,
    budget: float | int | None = None,
    *,
    adapter: str | type[Adapter] | None = None,
    **options: Any,
) -> Iterator[M]:
    """Patch a model within a `with` block. Arguments as for `patch`.

    A patch that was there before is suspended inside the block and serves again after it: the same object,
    with its report, its streams and its sessions. Blocks of several threads (or asynchronous tasks) do not
    see each other: each calls the model with its own strategy. A thread without a block of its own uses the
    only open one, if there is one. Of nested `applied` and `disabled` blocks the innermost counts; they may
    be left in any order.
    """
    made, target = requested(model, strategy, budget, adapter, options)
    with (
        patches_for(target.model, getattr(target, "trunk", None)) as patches,
        patches.scope("applied", _make_patch(target, made, patches)),
    ):
        yield model


@contextmanager
def disabled(model: M) -> Iterator[M]:
    """Read all visual tokens within a `with` block, in this thread; pruned caches stay usable.

    An `applied` block inside it prunes nevertheless: the innermost block counts. `vtoken.report` goes on
    telling of the last call that was not disabled.
    """
    inner = model_of(model)
    encoder = encoder_for(inner) if not hasattr(inner, "base_model") else None
    if encoder is None and not hasattr(inner, "base_model"):
        yield model
        return
    with (
        patches_for(inner, getattr(encoder, "trunk", None)) as patches,
        patches.scope("disabled", None, disabled=True),
    ):
        yield model


def report(model: Any) -> Report | EncoderReport:
    """Report on the last call of a patched model: tokens, FLOPs, KV bytes, times.

    Returns:
        A `vtoken.Report`, of a plain encoder a `vtoken.EncoderReport`.

    Raises:
        ValueError: if the model is not patched, or has not been called with visual tokens since.
    """
    current = patch_of(model)
    if current is None:
        raise ValueError("This model is not patched: call vtoken.patch(model, ...) first.")
    if isinstance(current, EncoderPatch):
        return current.report()
    made = current.recorder.report()
    if made is None:
        raise ValueError("This model has not read visual tokens since it was patched: call it first.")
    return made


def kept_tokens(model: Any) -> Tensor:
    """The tokens of the last prompt with pictures that the LLM read to its end.

    `last_hidden_state` and logits have the prompt's length: a dropped position repeats the kept one before.
    Of `states = model(**inputs).last_hidden_state`, the rows that the LLM computed for prompt b are
    `states[b][vtoken.kept_tokens(model)[b]]`.

    Returns:
        (B, q) bool over the columns of `input_ids` of that forward, False for padding.

    Raises:
        ValueError: if the model is not patched, or has not been called with visual tokens since.
    """
    current = patch_of(model)
    if current is None or isinstance(current, EncoderPatch):
        raise ValueError("This model is not patched: call vtoken.patch(model, ...) first.")
    read = current.context.read
    if read is None:
        raise ValueError("This model has not read visual tokens since it was patched: call it first.")
    return read.kept
