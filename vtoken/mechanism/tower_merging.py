"""Merge tokens inside the vision tower of a vision-language model.

The steps after the tower (packing of crops, the check of feature counts) count patches, and the tower's
output has one row for each: the state of the token into which the patch was merged. The merged tokens reach
the strategy's projector stage as `VisualTokens.merged`, and the copies are dropped before the LLM.

Captured states do not replace this: the layers after a merge attend over fewer tokens and give other values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..adapters.encoders.layer import shape_of
from ..adapters.encoders.run import EncoderRun
from ..adapters.towers.base import Tower
from ..adapters.towers.capture import Capture
from ..hooks import Hook, Hooks
from ..tokens import EncoderShape
from .encoder_layers import EncoderLayers, LayersAfter


class EncoderMerging:
    """The replaced layers and the hook that merge inside one tower.

    Args:
        tower: with equal grids of one size per forward (`tower.can_merge`).
        layers: tower layers in which the strategy is asked.
        strategy: () -> what acts in these layers; between attention and MLP if it has an `encoder_plan`.
        active: the capture of the running `get_*_features` call, if any.
    """

    def __init__(
        self,
        tower: Tower,
        layers: tuple[int, ...],
        strategy: Callable[[], Any],
        active: Callable[[], Capture | None],
    ) -> None:
        self.tower, self.strategy, self.active = tower, strategy, active
        self.prefix = int(tower.has_cls)
        self.between = hasattr(strategy(), "encoder_plan")
        if self.between:
            self.layers: Any = EncoderLayers(tower.split_layers, strategy, self)
        else:
            self.layers = LayersAfter(
                lambda: tower.layers, layers, lambda tokens: self.strategy().merge_in_encoder(tokens), self
            )
        self.hooks = Hooks(lambda: [Hook(self.tower.module, self._after_tower)])

    def refresh(self) -> None:
        """Look the layers up again."""
        self.layers.refresh()
        self.hooks.refresh()

    def remove(self) -> None:
        self.layers.remove()
        self.hooks.remove()

    def begin(self, x: Tensor) -> EncoderRun | None:
        capture = self.active()
        if capture is None:
            return None
        rows, n, _ = x.shape
        shape, plan = EncoderShape(self.tower.info.feature_layer + 1, n - self.prefix, self.prefix), None
        if self.between:
            shape = shape_of(self.tower.split_layers()[0], shape, self.strategy().drops)
            plan = self.strategy().encoder_plan(shape)
        capture.merged = EncoderRun(shape, plan, rows, n, self.prefix)
        return capture.merged

    def current(self) -> EncoderRun | None:
        capture = self.active()
        return None if capture is None else capture.merged

    def ended(self, run: EncoderRun) -> None:
        """The run stays with the capture until the tower has made its output."""

    def _after_tower(self, module: Any, args: Any, out: Any) -> Any:
        capture = self.active()
        if capture is None or capture.merged is None:
            return None
        run, capture.merged = capture.merged, None
        capture.owners.append(run.places())
        states = getattr(out, "hidden_states", None)
        if states is not None:
            out.hidden_states = tuple(None if x is None else run.spread_by_count(x) for x in states)
        return out
