"""Shorten the sequence inside an encoder: the forwards of its layers are replaced on the instances.

Between attention and MLP the strategy says which tokens are merged or dropped. The layers after it read the
shorter sequence. After the last layer every patch reads the token that it joined, so that all that follows
(norms, pooling, heads, projectors) sees a sequence of the unpatched length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..adapters.encoders.layer import EncoderLayer
from ..adapters.encoders.run import EncoderRun
from ..hooks import Wrapped, rebuilt
from ..selection import EncoderMerge
from ..tokens import EncoderShape, EncoderTokens


class Reduction(Protocol):
    """The part of a strategy that acts in an encoder."""

    @property
    def proportional(self) -> bool:
        """Whether log sizes are added to the attention logits."""

    def encoder_plan(self, shape: EncoderShape) -> Any:
        """The plan for an encoder."""

    def asked(self, layer: int, plan: Any) -> bool:
        """Whether it acts in a layer."""

    def enter_layer(self, x: Tensor, run: EncoderRun) -> Tensor:
        """The tokens that a layer reads."""

    def merge_in_encoder(self, tokens: EncoderTokens) -> EncoderMerge | None:
        """The merge between attention and MLP."""


class Runs(Protocol):
    """Holder of the running forward."""

    def begin(self, x: Tensor) -> EncoderRun | None:
        """A new run for (rows, n, C) before the first layer; None for a forward that stays as it is."""

    def current(self) -> EncoderRun | None:
        """The run that the latest `begin` of this thread made."""

    def ended(self, run: EncoderRun) -> None:
        """Called after the last layer."""


class EncoderLayers:
    """The replaced forwards of one encoder's layers.

    Args:
        find: lists the layers, first to last.
        strategy: () -> what acts between attention and MLP.
        runs: holds the running forward.
        follow: the arguments of a layer for the tokens that are left, from those for all tokens.
    """

    def __init__(
        self,
        find: Callable[[], list[EncoderLayer]],
        strategy: Callable[[], Reduction],
        runs: Runs,
        follow: Callable[[EncoderRun, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.find, self.strategy, self.runs, self.follow = find, strategy, runs, follow
        self.wrapped, self.layers, self.removed = Wrapped(), [], False  # type: tuple[Wrapped, list[EncoderLayer], bool]
        self.refresh()

    def refresh(self) -> None:
        """Look the layers up again: parts of the model may have been replaced."""
        if self.removed or not self._rebuilt():
            return
        self.wrapped.remove()
        self.layers = self.find()
        for i, layer in enumerate(self.layers):
            self.wrapped.wrap(layer.module, "forward", functools.partial(self._forward, i))

    def _rebuilt(self) -> bool:
        return [x.module for x in self.find()] != [x.module for x in self.layers]

    def remove(self) -> None:
        self.removed = True
        self.wrapped.remove()

    def _forward(self, i: int, original: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if i == 0 and not torch.compiler.is_compiling():
            self.refresh()
        layer = self.layers[i]
        rows_first = x.transpose(0, 1) if layer.transposed else x
        run = self.runs.begin(rows_first) if i == 0 else self.runs.current()
        if run is not None and i == 0:
            run.ends = min(run.ends or len(self.layers), len(self.layers))
        if run is None or not run.continues(i, rows_first):  # a layer called on its own
            if i and not torch.compiler.is_compiling() and not self.removed and self._rebuilt():
                raise rebuilt("The layers of this encoder are not those that were patched")
            if run is not None and 0 < i == run.layer < run.ends:
                raise _interfered(i, (run.rows, run.tokens), rows_first)
            return original(x, *args, **kwargs)
        acts = self.strategy().asked(i, run.plan)
        if acts or run.changed:
            x = self._reduced(layer, i, run, rows_first, layer.arguments(args, kwargs), acts)
        else:
            x = original(x, *args, **kwargs)
            run.work.append((run.rows, run.tokens, run.tokens, run.prefix))
            x = x.transpose(0, 1) if layer.transposed else x
        run.layer += 1
        if run.layer == run.ends:
            x = run.spread(x)
            self.runs.ended(run)
        return x.transpose(0, 1) if layer.transposed else x

    def _reduced(
        self, layer: EncoderLayer, i: int, run: EncoderRun, x: Tensor, call: dict[str, Any], acts: bool
    ) -> Tensor:
        x = self.strategy().enter_layer(x, run)
        call = call if self.follow is None else self.follow(run, call)
        bias = run.bias() if self.strategy().proportional else None
        heads, attend = layer.heads(x, call), run.tokens
        x = x + layer.mixed(heads.attend(layer.scale, bias, layer.attention_dropout), heads)
        if acts:
            tokens = EncoderTokens(
                i,
                x,
                run.prefix,
                run.ones(x),
                run.plan,
                keys=heads.mean_key,
                cls_attention=functools.partial(heads.first_row, layer.scale, bias),
            )
            with torch.no_grad():
                merge = self.strategy().merge_in_encoder(tokens)
            x = x if merge is None else run.merge(x, merge)
        run.work.append((run.rows, attend, run.tokens, run.prefix))
        return x + layer.mlp(x)


class LayersAfter:
    """The forwards of an encoder's layers, replaced for a strategy that merges after a layer.

    Args:
        find: lists the layers, first to last.
        layers: those after which `merge` is asked.
        merge: the strategy's `merge_in_encoder`.
        runs: holds the running forward.
    """

    def __init__(
        self,
        find: Callable[[], list[Any]],
        layers: tuple[int, ...],
        merge: Callable[[EncoderTokens], EncoderMerge | None],
        runs: Runs,
    ) -> None:
        self.find, self.asked, self.merge, self.runs = find, layers, merge, runs
        self.wrapped, self.modules = Wrapped(), []  # type: tuple[Wrapped, list[Any]]
        self.refresh()

    def refresh(self) -> None:
        """Look the layers up again: parts of the model may have been replaced."""
        now = self.find()
        if now == self.modules:
            return
        self.remove()
        self.modules = now
        for i, module in enumerate(now):
            self.wrapped.wrap(module, "forward", functools.partial(self._forward, i))

    def remove(self) -> None:
        self.wrapped.remove()
        self.wrapped, self.modules = Wrapped(), []

    def _forward(self, i: int, original: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = self.runs.begin(x) if i == 0 else self.runs.current()
        out = original(x, *args, **kwargs)
        if run is None or run.layer != i:
            return out
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        attend = run.tokens
        if i in self.asked:
            with torch.no_grad():
                merge = self.merge(
                    EncoderTokens(i, hidden, run.prefix, run.ones(hidden), grid=_square(run.shape.patches))
                )
            hidden = hidden if merge is None else run.merge(hidden, merge)
        run.work.append((run.rows, attend, attend, run.prefix))
        run.layer += 1
        if run.layer == len(self.modules):
            hidden = run.spread(hidden)
            self.runs.ended(run)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def _interfered(layer: int, left: tuple[int, int], x: Tensor) -> ValueError:
    return ValueError(
        f"Layer {layer - 1} of this encoder left {left[0]} sequences of {left[1]} tokens and layer {layer}"
        f" got {x.shape[0]} of {x.shape[1]}: tokens cannot be merged where something else changes them"
        " between layers; call it inside `with vtoken.disabled(model)`."
    )


def _square(patches: int) -> tuple[int, int] | None:
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None
