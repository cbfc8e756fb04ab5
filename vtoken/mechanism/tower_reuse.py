"""Compute some tokens of a stream's frames inside a vision tower, and reuse those of an earlier frame.

All frames of a call pass a layer together: first the references, through the original layer, then the
others in one batch, each with its reference. So a video in one call gives the same result as its frames
one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..adapters.towers.base import Tower
from ..adapters.towers.blocks import Block
from ..adapters.towers.capture import Capture, FramePass
from ..adapters.towers.packed import rotate
from ..hooks import Hook, Hooks, Wrapped
from ..kernels import gather_rows
from ..streams import FrameTokens, Reuse, keep
from .tower_attention import attend
from .tower_rows import Rows, stack


class TowerReuse:
    """The wrapped layers of one tower that reuses what was computed for an earlier frame.

    Subclasses write `begin`, `layer` and `counted`.

    Args:
        tower: with `tower.can_reuse`.
        layers: those that reuse; the others are computed in full.
        active: the capture of the running `get_*_features` call, if any.
        name: tells the towers of a model apart; a frame is never compared with one of another tower.
    """

    def __init__(
        self, tower: Tower, layers: set[int], active: Callable[[], Capture | None], name: str = ""
    ) -> None:
        self.tower, self.layers, self.active, self.name = tower, layers, active, name
        self.prefix = int(tower.has_cls)
        self.now: list[Any] = []  # the tower's layers
        self.blocks: list[Block] = []
        self.wrapped = Wrapped()
        self._wrap()
        self.hooks = Hooks(self._find)

    # -- to override -----------------------------------------------------------------------------------------
    def begin(self, run: Any, kind: Hashable, args: Any, kwargs: dict[str, Any]) -> None:
        """Plan a forward of the tower; frames of another `kind` are never compared."""
        raise NotImplementedError

    def layer(
        self, i: int, run: Any, original: Callable[..., Tensor], x: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """The output of a layer."""
        raise NotImplementedError

    def counted(self, run: Any) -> tuple[list[int], list[Tensor]]:
        """Per frame the tokens that were computed, and per patch (patches,) in which share of the layers."""
        raise NotImplementedError

    # -- provided --------------------------------------------------------------------------------------------
    def _wrap(self) -> None:
        self.now = self.tower.layers
        self.blocks = [self.tower.block(i) for i in range(len(self.now))]
        self.wrapped.remove()
        for i, layer in enumerate(self.now):
            self.wrapped.wrap(layer, "forward", functools.partial(self._layer, i))

    def _find(self) -> list[Hook]:
        module = self.tower.module
        hooks = [
            Hook(module, self._before_tower, before=True, kwargs=True),
            Hook(module, self._after_tower, kwargs=True),
        ]
        return hooks + [hook for i in sorted(self.layers) for hook in self.blocks[i].watch(self._record)]

    def refresh(self) -> None:
        """Look the layers and their parts up again."""
        now = self.tower.layers
        if any(a is not b for a, b in zip(now, self.now, strict=True)):
            self._wrap()
        self.hooks.refresh()

    def remove(self) -> None:
        self.hooks.remove()
        self.wrapped.remove()

    def _record(self, name: str, value: Tensor) -> None:
        run = self._running()
        if run is not None and run.parts is not None:
            run.parts[name] = value

    def _running(self) -> FramePass | None:
        capture = self.active()
        return None if capture is None else capture.frames

    def _before_tower(self, module: Any, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        run = self._running()
        if run is None or kwargs is None:
            return
        run.grids = self.tower.frame_grids(args, kwargs)
        run.videos = run.videos or [1] * len(run.grids)
        if len(run.grids) != sum(run.videos):
            raise RuntimeError(
                f"The tower was given {len(run.grids)} frames but the call has {sum(run.videos)}: "
                "the adapter does not know this kind of input."
            )
        self.begin(run, (self.name, str(module.dtype), str(module.device)), args, kwargs)

    def _after_tower(self, module: Any, args: Any, kwargs: dict[str, Any], out: Any = None) -> None:
        run = self._running()
        if run is None or out is None or not run.layers:
            return
        run.use.tokens = run.sizes
        run.use.recomputed, shares = self.counted(run)
        run.use.shares = self.tower.on_grid(shares, run.grids, args, kwargs)

    def _layer(
        self, i: int, original: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        run, layer = self._running(), self.now[i]
        if run is None:
            return original(hidden_states, *args, **kwargs)
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise NotImplementedError(
                "Reusing frames keeps state, which gradient checkpointing would meet twice: call model.eval()"
                " or model.gradient_checkpointing_disable()."
            )
        return self.layer(i, run, original, hidden_states, args, kwargs)


class FrameReuse(TowerReuse):
    """The wrapped layers of a tower whose layers choose the tokens to compute.

    Args:
        tower: with `tower.can_reuse`.
        reuse: the strategy's declaration.
        read: layers whose projections are read by taps; they are computed in full.
        active: the capture of the running `get_*_features` call, if any.
        name: of the tower.
    """

    def __init__(
        self, tower: Tower, reuse: Reuse, read: set[int], active: Callable[[], Capture | None], name: str = ""
    ) -> None:
        self.reuse = reuse
        super().__init__(tower, set(reuse.layers) - read, active, name)

    def begin(self, run: FramePass, kind: Hashable, args: Any, kwargs: dict[str, Any]) -> None:
        run.plan(kind, self.reuse.interval)

    def counted(self, run: FramePass) -> tuple[list[int], list[Tensor]]:
        computed = [round(float(count.sum()) / run.layers) for count in run.counts]
        return computed, [count[self.prefix :] / run.layers for count in run.counts]

    def layer(
        self,
        i: int,
        run: FramePass,
        original: Callable[..., Tensor],
        x: Tensor,
        args: Any,
        kwargs: dict[str, Any],
    ) -> Tensor:
        rows, block, use = Rows(x, run, kwargs), self.blocks[i], run.use
        every = list(range(len(rows.sizes)))
        full, groups = (run.full, run.groups) if i in self.layers else (every, [])
        use.flops_dense += sum(block.dense_flops(rows.windows[j]) for j in every)
        use.flops += sum(block.dense_flops(rows.windows[j]) for j in full)
        if i not in self.layers:
            return original(x, *args, **kwargs)
        if not run.layers:
            run.sizes = rows.sizes
            run.counts = [torch.zeros(n, device=x.device) for n in rows.sizes]
        run.layers += 1
        made = self._in_full(i, run, rows, full, original, args, kwargs) if full else None
        if made is not None and not groups:
            return made
        parts = [self._in_part(i, run, rows, group) for group in groups]
        run.entries = {}
        if made is None and len(parts) == 1:
            return parts[0].view_as(x)
        out = torch.empty_like(x)
        for frames, part in zip(
            [full, *groups] if full else groups, parts if made is None else [made, *parts], strict=True
        ):
            rows.put(out, frames, part)
        return out

    def _in_full(
        self,
        i: int,
        run: FramePass,
        rows: Rows,
        full: list[int],
        original: Callable[..., Tensor],
        args: Any,
        kwargs: Any,
    ) -> Tensor:
        """Compute reference frames with the original layer, and note its results for the others."""
        parts: dict[str, Tensor] = {}
        run.parts = parts
        try:
            made = original(rows.take(full), *args, **(kwargs | rows.arguments(full)))
        finally:
            run.parts = None
        each = (
            rows.split(x, full) for x in (parts["key"], parts["value"], parts["attention"] + parts["mlp"])
        )
        run.entries = dict(zip(full, zip(*each, strict=True), strict=True))
        for j in full:
            run.counts[j] += 1
        if run.state is not None:
            key, value, added = run.entries[full[-1]]
            run.stored[i] = keep(key), keep(value), keep(added)
        return made

    def _in_part(self, i: int, run: FramePass, rows: Rows, group: list[int]) -> Tensor:
        """Compute frames of one shape with their references -> (frames, n, C)."""
        block, x = self.blocks[i], rows.of(group)
        key_then, value_then, added = (
            stack(list(e)) for e in zip(*(run.entry(j, i) for j in group), strict=True)
        )
        normed = block.norm1(x)
        key = block.key(normed)
        chosen = run.chosen.get(group[0])
        if chosen is None or not self.reuse.shared:
            with torch.no_grad():
                chosen = self.reuse.choose(FrameTokens(i, key, key_then, self.prefix)).sort(1).values
            run.chosen[group[0]] = chosen
        chosen = chosen.to(x.device)
        for j, mine in zip(group, chosen, strict=True):
            run.counts[j][mine.to(run.counts[j].device)] += 1
        normed, here = gather_rows([normed, x], chosen)
        query, value = block.query_value(normed)
        value = value_then.to(value).scatter(1, spread(chosen, value), value)
        rotary = rows.rotary(group[0])
        if rotary is not None:
            query, key = rotate_both(block, query, key, chosen, rotary)
        mixed, pairs = attend(query, key, value, chosen, rows.windows[group[0]], block.heads, block.scale)
        linear = x.shape[1] * block.key_flops + chosen.shape[1] * block.chosen_flops
        run.use.flops += len(group) * linear + 4 * pairs * block.width
        here = here + block.out(mixed)
        here = here + block.mlp(block.norm2(here))
        return (x + added.to(x)).scatter_(1, spread(chosen, here), here.to(x))


def spread(index: Tensor, rows: Tensor) -> Tensor:
    """(B, m) as an index of whole rows (B, m, C), for `scatter`."""
    return index[..., None].expand_as(rows)


def rotate_both(
    block: Block, query: Tensor, key: Tensor, chosen: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Queries (frames, m, C) of the chosen tokens and keys (frames, n, C) of all, after rotary embedding."""
    flat = chosen.flatten()
    q = rotate(query.reshape(len(flat), block.heads, -1), (rotary[0][flat], rotary[1][flat]))
    k = rotate(key.unflatten(-1, (block.heads, -1)), rotary)
    return q.reshape(query.shape), k.flatten(-2)
