"""Joins a model, its adapter and a strategy; takes them apart again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

from .accounting import Report
from .active import LOCK, Gate, Patches, patches_for, patches_of
from .adapters.base import Adapter
from .adapters.registry import adapter_for
from .config import VTokenConfig
from .fit import check_fit, list_strategies, merging_layers, modalities_of, needs_of, reuse_of
from .hooks import Wrapped
from .mechanism.entrance_hooks import Sequence
from .mechanism.forward_context import State
from .mechanism.generation import generating
from .mechanism.layer_hooks import Stage
from .mechanism.planner import Chosen, Planner
from .mechanism.unread_features import Unread
from .mechanism.vision_hooks import VisionWatch
from .recorder import Recorder
from .strategies import Strategy
from .strategies.assembly import assemble
from .streams import unwrapped
from .tokens import Needs, Segment, Selection, VisualTokens

M = TypeVar("M")


class Patch:
    """Everything that one `patch` put on a model. Made by `patch` and `applied`; `patches` tells which calls use it."""

    def __init__(self, adapter: Adapter, strategy: Strategy, patches: Patches) -> None:
        check_fit(adapter, strategy)
        self.adapter, self.strategy = adapter, strategy
        self.state, self.gate = State(), Gate(patches, self)
        self.warned = False
        self.unread = None if strategy.is_identity else Unread(strategy.info.name)
        layers = len(getattr(adapter.decoder, "layers", ()))
        drops = () if strategy.is_identity else strategy.prefill_layers(layers)
        aligned = strategy.aligned_layers(layers) if drops else ()
        stages = [Stage(layer, strategy.select_in_prefill) for layer in drops]
        stage_of = [sum(s.layer <= i for s in stages) for i in range(layers)]
        stored = [len(stages) if i in aligned else stage for i, stage in enumerate(stage_of)]
        told = strategy.budget_counts()
        self.recorder = Recorder(adapter.model, adapter.decoder.config, stage_of, strategy.describe(), stored, told)
        needs = {m: needs_of(adapter, strategy, m) for m in adapter.modalities}
        wants_text = any(n.text_embeddings for n in needs.values()) and not strategy.is_identity
        if strategy.is_identity:
            needs = {m: Needs(modalities=n.modalities) for m, n in needs.items()}
        together = not strategy.is_identity and any(n.together for n in needs.values())
        planner = Planner(adapter, self._select, self.state, self._chosen, wants_text, bool(stages), together)
        self.wrapped = Wrapped()
        self.parts: list[Any] = [self.wrapped]
        try:
            merging, merge = merging_layers(adapter, strategy), strategy.merge_in_encoder
            reuse, watch = reuse_of(adapter, strategy), self.recorder
            state, gate, noted = self.state, self.gate, None if self.unread is None else self.unread.note
            push = None if wants_text else self._ask
            self.parts.append(
                VisionWatch(adapter, needs, state, gate, watch.timer, merging, merge, reuse, watch.used, push, noted)
            )
            self.parts.append(
                Sequence(adapter, planner, stages, strategy.positions, state, gate, watch, aligned, self.unread)
            )
            if hasattr(adapter.model, "generate"):
                self.wrapped.wrap(adapter.model, "generate", self._generate)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        for part in self.parts:
            part.remove()

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.gate.call() as served:
            if not served:
                return original(*args, **kwargs)
            self.state.unread = False
            out = generating(self.state, original, *args, **kwargs)
            if self.state.unread and self.unread is not None and not self.gate.disabled():
                self.unread.warn()
            return out

    def _select(self, tokens: VisualTokens) -> Selection:
        """The strategy's answer; what it notes of the stream meanwhile is forgotten, so that the next answer is the same."""
        return self._ask(replace(tokens, memory=copy.deepcopy(tokens.memory)))

    def _ask(self, tokens: VisualTokens) -> Selection:
        if tokens.modality not in self.strategy.needs(tokens.tower).modalities:
            fit = ", ".join(n for n in list_strategies(model=self.adapter.model) if tokens.modality in modalities_of(n))
            raise ValueError(
                f"{self.strategy.info.name} is not defined for {tokens.modality} input, which this prompt has: use {fit}."
            )
        self._warn_of_one_token(tokens)
        if self.strategy.is_identity or not self.strategy.acts_on_projector:
            return Selection.everything(len(tokens), tokens.cells.device)
        return self.strategy.select(tokens).check(len(tokens))

    def _warn_of_one_token(self, tokens: VisualTokens) -> None:
        """Warn once where a budget of 1, which is one token, may have been meant as 1.0, which is all of them."""
        parts = getattr(self.strategy, "ordered", [self.strategy])
        dropping = [p.budget for p in parts if p.acts_on_projector or p.acts_inside]
        most = _largest(tokens.segments)
        if not self.warned and most > 16 and any(type(b) is int and b == 1 for b in dropping):
            self.warned = True
            warnings.warn(
                f"budget=1 leaves one of the {most} visual tokens of an image or frame: write budget=1.0 to keep them all.",
                stacklevel=2,
            )

    def _chosen(self, chosen: list[Chosen], beams: int) -> None:
        self.recorder.chosen(chosen, beams)
        budget = self.strategy.budget
        if isinstance(budget, int) and not self.warned:
            # a whole number counts per frame of a video, and per image with all its crops
            most = max((_largest(c.tokens.segments) for c in chosen), default=budget)
            if budget > most:
                self.warned = True
                warnings.warn(
                    f"The budget of {budget} tokens is larger than the {most} visual tokens there are: all are kept.",
                    stacklevel=2,
                )


def _largest(segments: tuple[Segment, ...]) -> int:
    frames = [s.fed for s in segments if s.kind == "frame"]
    return max(frames) if frames else sum(s.fed for s in segments)


def make_strategy(strategy: Any, budget: float | int | None, options: dict[str, Any]) -> Strategy:
    """A Strategy from what a user names, which may be a VTokenConfig."""
    if isinstance(strategy, VTokenConfig):
        given = strategy.options | {"budget": strategy.budget}
        if strategy.positions is not None:
            given["positions"] = strategy.positions
        strategy, options = strategy.strategy, given | options
    return assemble(strategy, budget, options)


def patch(model: M, strategy: Any, budget: float | int | None = None, **options: Any) -> M:
    """Make a Hugging Face vision-language model read fewer visual tokens, in place.

    Args:
        model: an unmodified transformers model.
        strategy: a name (`vtoken.list_strategies()`), a `vtoken.strategies` object or a `VTokenConfig`; or "visionzip+fastv"
            or the list ["visionzip", "fastv"], a projector strategy and one that drops inside the LLM, under one budget.
        budget: share of the visual tokens in (0, 1], or a whole number of tokens per image or frame; the strategy's
            default if None.
        options: further hyper-parameters of the strategy; of several, one mapping per name, as in `fastv={"layer": 3}`, and
            `split`, see `vtoken.strategies.Composite`.

    Returns:
        The model itself.

    Raises:
        TypeError: if the model or the strategy is no such thing.
        ValueError: for an unknown strategy, a value of a wrong type or out of range, a model without adapter, a strategy
            that does not fit it, or a model that is patched already.
    """
    adapter = adapter_for(model)
    made = make_strategy(strategy, budget, options)
    with patches_for(adapter.model) as patches:
        check_unpatched(patches, adapter)
        new = Patch(adapter, made, patches)
        with LOCK:
            try:
                check_unpatched(patches, adapter)  # another thread may have been faster
                patches.put(new)
            except BaseException:
                new.remove()
                raise
    return model


def check_unpatched(patches: Patches, adapter: Adapter) -> None:
    """Raise ValueError if a model has a patch."""
    current = cast("Patch | None", patches.current(calls=False))
    if current is None:
        return
    name, other = current.strategy.info.name, current.adapter.model
    if other is not adapter.model:
        raise ValueError(
            f"The {type(other).__name__} that shares its modules with this {type(adapter.model).__name__} is patched with "
            f"{name} already: a patch on either serves both, call vtoken.unpatch first to replace it."
        )
    raise ValueError(
        f"This model is patched with {name} already: call vtoken.unpatch(model) first, or use "
        "`with vtoken.applied(model, ...)` to replace it for a while."
    )


def unpatch(model: M) -> M:
    """Take the patch off again; a model that is not patched stays as it is. Returns the model.

    Calls of other threads that use the patch finish with it; its hooks go when the last of them has ended. Inside a
    `vtoken.applied` block the patch of this block is taken off.

    Raises:
        RuntimeError: if another thread is inside `with vtoken.applied(...)` of this model, and this one is not.
    """
    patches = patches_of(model)
    if patches is not None:
        patches.take_off()
    return model


def patch_of(model: Any) -> Patch | None:
    """The patch that a call of the model would use here, None if there is none."""
    patches = patches_of(model)
    return None if patches is None else cast("Patch | None", patches.current())


@contextmanager
def applied(model: M, strategy: Any, budget: float | int | None = None, **options: Any) -> Iterator[M]:
    """Patch within a `with` block. Arguments as for `patch`.

    The patch that was there before rests inside the block and goes on after it: the same object, with its report, its
    streams and its sessions. Blocks of several threads (or asynchronous tasks) do not see each other: each calls the model
    with its own strategy. A thread that has no block of its own takes part in the only open one, if there is one.
    Of `applied` and `disabled` blocks inside each other the innermost counts; they may be left in any order.
    """
    adapter = adapter_for(model)
    made = make_strategy(strategy, budget, options)
    with patches_for(adapter.model) as patches, patches.scope("applied", Patch(adapter, made, patches)):
        yield model


@contextmanager
def disabled(model: M) -> Iterator[M]:
    """Read all visual tokens within a `with` block, in this thread; a cache that was pruned before stays usable.

    An `applied` block inside it prunes nevertheless: the innermost block counts.
    """
    inner = unwrapped(model)
    if not hasattr(inner, "base_model"):
        yield model
        return
    with patches_for(inner) as patches, patches.scope("disabled", None, disabled=True):
        yield model


def report(model: Any) -> Report:
    """What the last call of a patched model did: tokens, FLOPs, KV bytes, times.

    Raises:
        ValueError: if the model is not patched, or has not been called with visual tokens since.
    """
    current = patch_of(model)
    if current is None:
        raise ValueError("This model is not patched: call vtoken.patch(model, ...) first.")
    made = current.recorder.report()
    if made is None:
        raise ValueError("This model has not read visual tokens since it was patched: call it first.")
    return made
