"""Merge tokens inside a vision tower: after chosen layers its sequence becomes shorter.

The layers in between, and the taps there, work on the short sequence. The tower's output is spread over
the original patches again, and every patch takes the state of the token into which it was merged, because
the steps after the tower (packing of crops, the check of feature counts) count patches. The merged tokens
reach the strategy's projector stage as `VisualTokens.merged`, and the copies are dropped before the LLM.

Captured states do not replace this: the layers after a merge attend over fewer tokens and give other
values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapters.towers.base import Tower
from ..adapters.towers.capture import Capture, Merged
from ..hooks import Hook, Hooks
from ..kernels import gather_merge
from ..selection import EncoderMerge
from ..tokens import EncoderTokens


class EncoderMerging:
    """The hooks that merge inside one tower.

    Args:
        tower: with equal grids of one size per forward (`tower.can_merge`).
        layers: tower layers after which `merge` is called.
        merge: the strategy's `merge_in_encoder`.
        active: the capture of the running `get_*_features` call, if any.
    """

    def __init__(
        self,
        tower: Tower,
        layers: tuple[int, ...],
        merge: Callable[[EncoderTokens], EncoderMerge | None],
        active: Callable[[], Capture | None],
    ) -> None:
        self.tower, self.merge, self.active = tower, merge, active
        self.prefix = int(tower.has_cls)
        self.layers = layers
        self.hooks = Hooks(self._find)

    def _find(self) -> list[Hook]:
        now = self.tower.layers
        hooks = [Hook(now[i], functools.partial(self._after_layer, i), first=True) for i in self.layers]
        return [*hooks, Hook(self.tower.module, self._after_tower)]

    def refresh(self) -> None:
        """Look the layers up again."""
        self.hooks.refresh()

    def remove(self) -> None:
        self.hooks.remove()

    def _after_layer(self, i: int, module: Any, args: Any, out: Any) -> Any:
        capture = self.active()
        if capture is None:
            return None
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        patches = hidden[:, self.prefix :]
        state = capture.merged = capture.merged or Merged.nothing(patches)
        side = math.isqrt(state.owner.shape[1])
        if side * side != state.owner.shape[1]:
            return None
        with torch.no_grad():
            answer = self.merge(EncoderTokens(i, patches, (side, side), state.sizes))
        if answer is None:
            return None
        state.follow(answer)
        short = gather_merge(patches, answer.keep, answer.into, answer.weight)
        hidden = torch.cat([hidden[:, : self.prefix], short], 1)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    def _after_tower(self, module: Any, args: Any, out: Any) -> Any:
        capture = self.active()
        if capture is None or capture.merged is None:
            return None
        state, capture.merged = capture.merged, None
        capture.owners.append(state.owner)
        if isinstance(out, Tensor):
            return self._spread(out, state)
        for name in ("last_hidden_state", "hidden_states"):
            value = getattr(out, name, None)
            if isinstance(value, Tensor):
                setattr(out, name, self._spread(value, state))
            elif value is not None:
                setattr(out, name, tuple(None if x is None else self._spread(x, state) for x in value))
        return out

    def _spread(self, hidden: Tensor, state: Merged) -> Tensor:
        """(segments, prefix + m, C) of any length -> (segments, prefix + patches, C)."""
        owner = state.by_count.get(hidden.shape[1] - self.prefix)
        if owner is None:
            return hidden
        spread = gather_merge(hidden[:, self.prefix :], owner)
        return torch.cat([hidden[:, : self.prefix], spread], 1)
