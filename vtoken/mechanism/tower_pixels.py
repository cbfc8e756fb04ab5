"""Skip the places of frames that take their rows from others or from earlier frames, in a tower's layers.

The computed tokens of all frames of a call pass a layer together, as one sequence without the others. Frames
that are computed in full pass the original layer, and a call of such frames alone is the plain tower.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.towers.base import Tower
from ..adapters.towers.blocks import Block
from ..adapters.towers.capture import Capture
from ..adapters.towers.packed import rotate
from ..adapters.towers.pixel_pass import PixelPass
from ..hooks import Hook
from ..streams import PixelReuse
from .tower_reuse import TowerReuse
from .tower_rows import Rows


class PixelSkipping(TowerReuse):
    """The wrapped layers of one tower.

    Args:
        tower: with `tower.can_reuse`.
        reuse: the strategy's declaration.
        read: layers whose projections are read by taps; all tokens pass them.
        active: the capture of the running `get_*_features` call, if any.
        name: of the tower.
    """

    def __init__(
        self,
        tower: Tower,
        reuse: PixelReuse,
        read: set[int],
        active: Callable[[], Capture | None],
        name: str = "",
    ) -> None:
        self.reuse = reuse
        super().__init__(tower, set(range(tower.info.num_layers)) - read, active, name)

    def begin(self, run: PixelPass, kind: Hashable, args: Any, kwargs: dict[str, Any]) -> None:
        run.compare(kind, self.tower.frame_patches(args, kwargs), self.reuse, self.prefix)

    def _find(self) -> list[Hook]:
        hooks, embedding = super()._find(), self.tower.embedding
        if embedding is not None and 0 in self.layers:  # else all of its rows are read
            hooks += [
                Hook(embedding, self._before_embedding, before=True),
                Hook(embedding, self._after_embedding),
            ]
        for merger in self.tower.mergers:
            hooks += [Hook(merger, self._before_merger, before=True), Hook(merger, self._after_merger)]
        return hooks

    def _skipping(self) -> PixelPass | None:
        """The pass, if it leaves places out; told on the CPU, so that no device is waited for."""
        run = self._running()
        return run if isinstance(run, PixelPass) and len(run.full) < len(run.origins) else None

    def _before_embedding(self, module: Any, args: Any) -> Any:
        run = self._skipping()
        return None if run is None else (args[0][run.embedded], *args[1:])

    def _after_embedding(self, module: Any, args: Any, out: Tensor) -> Any:
        run = self._skipping()
        if run is None:
            return None
        rows = out.new_zeros(len(run.embedded), out.shape[-1])  # no layer reads the others
        rows[run.embedded] = out
        return rows

    def _merging(self) -> PixelPass | None:
        """The pass, if its pool has fewer rows than its frames."""
        run = self._running()
        if not isinstance(run, PixelPass) or run.outputs is None:
            return None
        return run if len(run.outputs) < len(run.source) else None

    def _before_merger(self, module: Any, args: Any) -> Any:
        run = self._merging()
        return None if run is None else (run.outputs, *args[1:])

    def _after_merger(self, module: Any, args: Any, out: Tensor) -> Any:
        run = self._merging()
        return None if run is None else run.merged(out)

    def counted(self, run: PixelPass) -> tuple[list[int], list[Tensor]]:
        return [int(c.sum()) for c in run.computed], [c[self.prefix :].float() for c in run.computed]

    def layer(
        self,
        i: int,
        run: PixelPass,
        original: Callable[..., Tensor],
        x: Tensor,
        args: Any,
        kwargs: dict[str, Any],
    ) -> Tensor:
        rows, block, full = Rows(x, run, kwargs), self.blocks[i], run.full
        every = list(range(len(rows.sizes)))
        run.use.flops_dense += sum(block.dense_flops(rows.windows[j]) for j in every)
        passing = full if i in self.layers else every
        run.use.flops += sum(block.dense_flops(rows.windows[j]) for j in passing)
        run.layers += 1
        run.outputs = None
        if len(full) == len(every) and not run.keeps:
            return original(x, *args, **kwargs)
        if i not in self.layers:  # every token passes it, the skipped ones with the rows of their origin
            made = original(x, *args, **kwargs).flatten(0, -2)
            none = made.new_empty(0)
            out = run.pool(i, 2, [made[run.whole], made[run.some]])
            run.store(i, (none, none, out))
            run.outputs = out
            return out[run.source].view_as(x)
        parts = [self._in_full(run, rows, block, original, args, kwargs)] if full else []
        if len(run.some):
            parts.append(self._in_part(i, run, rows, block, parts))
        key, value, out = (run.pool(i, what, [part[what] for part in parts]) for what in range(3))
        run.store(i, (key, value, out))
        run.outputs = out
        return out[run.source].view_as(x)

    def _in_full(
        self,
        run: PixelPass,
        rows: Rows,
        block: Block,
        original: Callable[..., Tensor],
        args: Any,
        kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated keys, values and outputs (rows, C) of frames, through the original layer."""
        parts: dict[str, Tensor] = {}
        run.parts = parts
        try:
            made = original(rows.take(run.full), *args, **(kwargs | rows.arguments(run.full)))
        finally:
            run.parts = None
        key, value = (parts[name].flatten(0, -2) for name in ("key", "value"))
        return rotated(key, block, rows, run.whole), value, made.flatten(0, -2)

    def _in_part(
        self, i: int, run: PixelPass, rows: Rows, block: Block, full: list[tuple[Tensor, Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated keys, values and outputs (m, C) of the computed tokens of the other frames."""
        x = rows.x.flatten(0, -2)[run.some]
        normed = block.norm1(x)
        key = rotated(block.key(normed), block, rows, run.some)
        query, value = block.query_value(normed)
        query = rotated(query, block, rows, run.some)
        keys = run.pool(i, 0, [*(part[0] for part in full), key])
        values = run.pool(i, 1, [*(part[1] for part in full), value])
        mixed, bounds = torch.empty_like(value), rows.kwargs.get("cu_seqlens") if rows.packed else None
        for mine, seen in run.attending(rows.windows, id(bounds)):
            q, k, v = (
                y.unflatten(-1, (block.heads, -1)).transpose(1, 2)
                for y in (query[mine].to(value), keys[seen].to(value), values[seen].to(value))
            )
            out = F.scaled_dot_product_attention(q, k, v, scale=block.scale)
            mixed[mine] = out.transpose(1, 2).flatten(2)
            run.use.flops += 4 * block.width * mine.numel() * seen.shape[1]
        run.use.flops += len(x) * (block.key_flops + block.chosen_flops)
        x = x + block.out(mixed)
        return key, value, x + block.mlp(block.norm2(x))


def rotated(x: Tensor, block: Block, rows: Rows, at: Tensor) -> Tensor:
    """Queries or keys (m, C) of the rows `at` of a layer's input after rotary embedding, if there is one."""
    rotary = rows.kwargs.get("position_embeddings") if rows.packed else None
    if rotary is None:
        return x
    return rotate(x.unflatten(-1, (block.heads, -1)), (rotary[0][at], rotary[1][at])).flatten(-2)
