"""Joins a model, its adapter and a strategy; takes them apart again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

from .accounting import Report
from .active import LOCK, Gate, Patches, patches_for, patches_of
from .adapters.base import Adapter
from .adapters.encoded import VisionWatch
from .adapters.generation import generating
from .adapters.hooks import Wrapped
from .adapters.layers import Stage
from .adapters.plan import Chosen, Planner
from .adapters.registry import adapter_for
from .adapters.rows import check_projections
from .adapters.sequence import Sequence
from .adapters.state import State
from .adapters.unread import Unread
from .checks import found
from .config import VTokenConfig
from .recorder import Recorder
from .strategies import Composite, Strategy, combine, create, list_names, strategy_info
from .strategies.base import check_methods
from .strategies.composition import options_of
from .strategies.registry import parse_strategy
from .streams import Reuse, unwrapped
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
        self.recorder = Recorder(adapter.model, adapter.decoder.config, stage_of, describe(strategy), stored)
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


def describe(strategy: Strategy) -> str:
    """`name(option=value, ...)` with the options that differ from their defaults, and the budget."""
    if isinstance(strategy, Composite):
        shared = "" if strategy.budget is None else f", sharing {_budget(strategy.budget)}"
        return " then ".join(map(describe, strategy.ordered)) + shared
    options = [_budget(strategy.budget)]
    for f in fields(strategy):
        if f.init and f.name != "budget" and getattr(strategy, f.name) != f.default:
            options.append(f"{f.name}={getattr(strategy, f.name)!r}")
    return f"{strategy.info.name}({', '.join(options)})"


def _budget(budget: float | int) -> str:
    """Of a share, four digits: more tell a reader nothing. 1.0 and 1 stay apart."""
    short = float(f"{budget:.4g}") if isinstance(budget, float) else budget
    return f"budget={short if short != 1 or budget == 1 else budget}"


def merging_layers(adapter: Adapter, strategy: Strategy) -> dict[str, tuple[int, ...]]:
    """Per modality the tower layers behind which the strategy merges."""
    if strategy.is_identity:
        return {}
    return {m: strategy.encoder_layers(tower.info) for m, tower in adapter.towers.items()}


def reuse_of(adapter: Adapter, strategy: Strategy) -> dict[str, Reuse]:
    """Per modality what its tower reuses between frames, where the tower can and the strategy wants it."""
    if strategy.is_identity:
        return {}
    towers = {m: tower for m, tower in adapter.towers.items() if tower.can_reuse}
    declared = {m: strategy.reuse(tower.info) for m, tower in towers.items()}
    return {m: reuse for m, reuse in declared.items() if reuse is not None and reuse.interval > 1}


def needs_of(adapter: Adapter, strategy: Strategy, modality: str) -> Needs:
    tower = adapter.towers.get(modality)
    return strategy.needs(None if tower is None else tower.info)


def modalities_of(name: str) -> tuple[str, ...]:
    """The kinds of input a strategy is defined for."""
    return strategy_info(name).cls().needs(None).modalities


def check_fit(adapter: Adapter, strategy: Strategy) -> None:
    """Raise ValueError with one sentence if this strategy cannot serve this model."""
    name, kind = strategy.info.name, adapter.config.model_type
    served = [m for m in adapter.modalities if m in needs_of(adapter, strategy, m).modalities]
    if not served:
        raise ValueError(
            f"{name} is defined for {' and '.join(needs_of(adapter, strategy, adapter.modalities[0]).modalities)} input, "
            f"{kind} models read {' and '.join(adapter.modalities)}: use {', '.join(fitting(adapter))}."
        )
    for modality in served:
        lacking = lacking_of(adapter, strategy, modality)
        if lacking:
            cls = "the attention of a CLS token"
            words = {"cls_attention": cls, "cls_logits": cls, "received_attention": "attention maps of the tower"}
            words |= {"reuse": "layers that can be computed in part", "pixels": "square frames of one size"}
            missing = " and ".join(words.get(x, x.replace("_", " ")) for x in lacking)
            received = "received_attention" in adapter.provides(modality) and hasattr(strategy, "score")
            extension = ' pass score="received" to rank by attention received, or' if received else ""
            extension = " pass thumbnail=False, or" if lacking == ["pixels"] and hasattr(strategy, "thumbnail") else extension
            raise ValueError(
                f"{name} needs {missing}, which the vision tower of this {kind} model does not have:{extension} "
                f"use {', '.join(fitting(adapter))}."
            )
    if strategy.positions == "renumber" and hasattr(adapter.base, "rope_deltas"):
        raise ValueError(
            f"positions='renumber' has no meaning for the multimodal rope of {kind}: use positions='original'."
        )
    if "flex" in (getattr(adapter.decoder.config, "_attn_implementation", None) or ""):
        raise ValueError(
            "flex_attention masks cannot be cut: load the model with attn_implementation='sdpa', 'eager' or "
            "'flash_attention_2'."
        )
    if not strategy.is_identity and strategy.acts_inside:
        check_inside(adapter, strategy)


def lacking_of(adapter: Adapter, strategy: Strategy, modality: str) -> list[str]:
    """What the strategy wants of this model that it does not have."""
    lacking = adapter.lacking(needs_of(adapter, strategy, modality), modality)
    tower = adapter.towers.get(modality)
    reuses = strategy.acts_between_frames and (tower is None or not tower.can_reuse)
    return [*lacking, "reuse"] if reuses else lacking


def check_inside(adapter: Adapter, strategy: Strategy) -> None:
    """Raise ValueError with one sentence if this strategy cannot drop inside the LLM of this model."""
    name, kind, decoder = strategy.info.name, adapter.config.model_type, adapter.decoder
    if not hasattr(decoder, "layers"):
        raise ValueError(
            f"{name} drops inside the LLM, whose layers vtoken cannot see in {kind}: use a projector strategy."
        )
    odd = sorted(set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if odd:
        raise ValueError(
            f"{name} drops inside the LLM, which cannot be done to layers of type {', '.join(odd)}: use a projector strategy."
        )
    check_projections(decoder, name, kind)
    strategy.check_depth(len(decoder.layers))


def goes_inside(adapter: Adapter, strategy: Strategy) -> bool:
    try:
        check_inside(adapter, strategy)
    except ValueError:
        return False
    return True


def fitting(adapter: Adapter, pattern: str = "*") -> list[str]:
    """Strategies that fit a model, by what its adapter provides."""
    out = []
    for name in list_names(pattern):
        strategy = strategy_info(name).cls()
        if any(
            m in needs_of(adapter, strategy, m).modalities and not lacking_of(adapter, strategy, m)
            for m in adapter.modalities
        ) and (not strategy.acts_inside or goes_inside(adapter, strategy)):
            out.append(name)
    return out


def list_strategies(pattern: str = "*", model: Any = None) -> list[str]:
    """Names of strategies that match a shell pattern, such as "*cls*"; with `model`, those that fit it.

    Raises:
        TypeError, ValueError: if `model` is no model, or has no adapter.
    """
    return list_names(pattern) if model is None else fitting(adapter_for(model), pattern)


def make_strategy(strategy: Any, budget: float | int | None, options: dict[str, Any]) -> Strategy:
    """A Strategy from a name, an instance or a VTokenConfig. Raises TypeError for one that has no method to ask."""
    made = _make_strategy(strategy, budget, options)
    check_methods(type(made))
    return made


def _make_strategy(strategy: Any, budget: float | int | None, options: dict[str, Any]) -> Strategy:
    if isinstance(strategy, VTokenConfig):
        given = dict(strategy.options)
        given["budget"] = strategy.budget
        if strategy.positions is not None:
            given["positions"] = strategy.positions
        strategy, options = strategy.strategy, given | options
    if isinstance(strategy, list | tuple) and len(strategy) == 1:
        strategy = strategy[0]
        options = options_of(strategy, options) | options if isinstance(strategy, str) else options
    if isinstance(strategy, str):
        strategy = parse_strategy(strategy)
    if isinstance(strategy, list | tuple):
        return combine(strategy, budget if budget is not None else options.pop("budget", None), **options)
    if isinstance(strategy, Strategy):
        if budget is not None or options:
            given_names = ", ".join(([] if budget is None else ["budget"]) + list(options))
            raise ValueError(
                f"{type(strategy).__name__} is configured already: set {given_names} when you make it, not in patch()."
            )
        return strategy
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        strategy = strategy.info.name
    if not isinstance(strategy, str):
        raise TypeError(
            f"A strategy is a name such as 'hired', a vtoken.strategies object, a list of them or a VTokenConfig, "
            f"found {found(strategy)}."
        )
    if budget is not None:
        options = options | {"budget": budget}
    return create(strategy, **options)


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
        check_unpatched(adapter, patches.current(calls=False))
        new = Patch(adapter, made, patches)
        with LOCK:
            try:
                check_unpatched(adapter, patches.current(calls=False))  # another thread may have been faster
                patches.put(new)
            except BaseException:
                new.remove()
                raise
    return model


def check_unpatched(adapter: Adapter, current: Patch | None) -> None:
    """Raise ValueError if a model has a patch."""
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
    return None if patches is None else patches.current()


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
