"""Put a strategy on a model (`patch`, `applied`), take it off, and report on its calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import Tensor

from .accounting import EncoderReport, Report
from .active import LOCK, Patches, patches_for, patches_of
from .adapters.base import Adapter
from .adapters.encoders.encoder import encoder_for
from .adapters.registry import model_of
from .encoder_patching import EncoderPatch
from .model_patching import Patch
from .requested import requested
from .strategies import Strategy

M = TypeVar("M")


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
            inside the LLM, under one budget. A name may have options: "fastv(layer=3)". None for "farcover",
            with relevance=0 where the LLM's layers cannot tell what the question looks at.
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
