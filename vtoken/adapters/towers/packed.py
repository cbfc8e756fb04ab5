"""Towers that read all images of a call as one sequence, with rotary embedding and windows of attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...hooks import Hook
from ...kernels import received_attention
from ...tokens import Needs
from .base import Tower
from .capture import Capture


@dataclass
class Packing:
    """The layout of images and videos in one forward of the tower.

    Attributes:
        items: per image or video its segments (images, frames) and the cells of each.
        patches: (cells, patches per cell) int64, the places of every cell's patches in the tower's sequence.
        grids: per image or video (rows, columns) of the cells of a segment.
        bounds: (windows + 1,) int, bounds of the attention windows; None if each attention module is given
            them (`cu_seqlens`).
    """

    items: list[tuple[int, int]]
    patches: Tensor
    grids: list[tuple[int, int]]
    bounds: Tensor | None = None


class PackedTower(Tower):
    """A tower over one packed sequence; subclasses write `packing` and `query_key`."""

    # -- to override -----------------------------------------------------------------------------------------
    def packing(self, args: Any, kwargs: dict[str, Any]) -> Packing:
        """The layout of a forward with these arguments."""
        raise NotImplementedError

    def query_key(self, layer: int, outputs: list[Tensor]) -> Iterable[Tensor]:
        """Queries and keys before rotary embedding, (patches, heads, head_dim), from projection outputs."""
        raise NotImplementedError

    def rotary(self, kwargs: dict[str, Any]) -> Any:
        """(cos, sin), (patches, head_dim) each, from the arguments of an attention module; None without."""
        return kwargs.get("position_embeddings")

    # -- provided --------------------------------------------------------------------------------------------
    @property
    def provides(self) -> frozenset[str]:
        return super().provides | {"states"}

    def on_grid(
        self, values: list[Tensor], grids: list[tuple[int, int]], args: Any, kwargs: dict[str, Any]
    ) -> list[Tensor]:
        """The means of the patches that are merged into one cell."""
        packing = self.packing(args, kwargs)
        cells = torch.cat(values)[packing.patches].mean(1)
        sizes = [grid for grid, (n, _) in zip(packing.grids, packing.items, strict=True) for _ in range(n)]
        each = cells.split([h * w for h, w in sizes])
        return [value.view(size) for value, size in zip(each, sizes, strict=True)]

    def frame_patches(self, args: Any, kwargs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """For towers whose input has the patches of a cell side by side."""
        packing, names = self.packing(args, kwargs), ("hidden_states", "pixel_values")
        pixels: Tensor = args[0] if args else next(kwargs[name] for name in names if name in kwargs)
        cells, tokens = pixels.view(*packing.patches.shape, -1), packing.patches.cpu()
        grids = [grid for grid, (n, _) in zip(packing.grids, packing.items, strict=True) for _ in range(n)]
        sizes = [rows * columns for rows, columns in grids]
        frames = zip(cells.split(sizes), tokens.split(sizes), grids, strict=True)
        return [(x.unflatten(0, grid), (mine - mine.min()).unflatten(0, grid)) for x, mine, grid in frames]

    def taps(self, needs: Needs, active: Callable[[], Capture | None]) -> list[Hook]:
        layers, states = sorted({*needs.received_attention, *needs.keys}), sorted(set(needs.states))
        if not layers and not states:
            return []
        hooks = [Hook(self.module, functools.partial(self._before_tower, active), before=True, kwargs=True)]
        for layer in layers:
            note = functools.partial(self._before_attention, active)
            hooks.append(Hook(self.attention(layer), note, before=True, kwargs=True))
            for projection in self.projections(layer):
                hooks.append(Hook(projection, functools.partial(self._on_projection, active, layer)))
        return hooks + [Hook(self.layers[i], functools.partial(self._on_output, active, i)) for i in states]

    def _on_output(
        self, active: Callable[[], Capture | None], layer: int, module: Any, args: Any, out: Any
    ) -> None:
        capture = active()
        forward = _forward(capture)
        if capture is None or forward is None:
            return
        packing = forward.packing
        hidden = out[0] if isinstance(out, tuple) else out
        cells = hidden.reshape(-1, hidden.shape[-1])[packing.patches.to(hidden.device)]
        side = math.isqrt(cells.shape[1])
        each = cells.split([a * b for a, b in packing.items])
        for item, (count, _), (rows, columns) in zip(each, packing.items, packing.grids, strict=True):
            maps = item.view(count, rows, columns, side, side, -1).transpose(2, 3)
            capture.add("states", layer, maps.reshape(count, 1, rows * side, columns * side, -1))

    def _before_tower(
        self,
        active: Callable[[], Capture | None],
        module: Any,
        args: Any,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        capture = active()
        if capture is not None and kwargs is not None:
            capture.pending["forward"] = _Forward(self.packing(args, kwargs))

    def _before_attention(
        self,
        active: Callable[[], Capture | None],
        module: Any,
        args: Any,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        forward = _forward(active())
        if forward is not None and kwargs is not None:
            forward.bounds, forward.rotary = kwargs.get("cu_seqlens"), self.rotary(kwargs)
            forward.outputs = []

    def _on_projection(
        self, active: Callable[[], Capture | None], layer: int, module: Any, args: Any, out: Tensor
    ) -> None:
        capture = active()
        forward = _forward(capture)
        if capture is None or forward is None:
            return
        packing = forward.packing
        forward.outputs = [*forward.outputs, out.detach()]
        if len(forward.outputs) < len(self.projections(layer)):
            return
        query, key = self.query_key(layer, forward.outputs)
        if forward.rotary is not None:
            query, key = (rotate(x, forward.rotary) for x in (query, key))
        forward.outputs = []
        self.record_packed(capture, layer, query, key, forward.bounds, packing)

    def record_packed(
        self,
        capture: Capture,
        layer: int,
        query: Tensor,
        key: Tensor,
        bounds: Tensor | None,
        packing: Packing,
    ) -> None:
        """Add the wanted values of one layer.

        Args:
            query, key: (patches, heads, head_dim) after rotary embedding.
            bounds: (windows + 1,) int, those of the layer's attention windows, unless `packing` has them.
        """
        if layer in capture.needs.received_attention:
            bounds = bounds if packing.bounds is None else packing.bounds
            q, k = query.transpose(0, 1)[None], key.transpose(0, 1)[None]
            received = received_attention(q, k, self.scale(layer), bounds)[0]
            self._add(capture, "received_attention", layer, received, packing)
        if layer in capture.needs.keys:
            self._add(capture, "keys", layer, key.flatten(1), packing)

    @staticmethod
    def _add(capture: Capture, what: str, layer: int, value: Tensor, packing: Packing) -> None:
        """Add values per patch (patches, ...) as means per cell, item by item."""
        cells = value[packing.patches.to(value.device)].mean(1)
        for item, (count, size) in zip(
            cells.split([a * b for a, b in packing.items]), packing.items, strict=True
        ):
            capture.add(what, layer, item.unflatten(0, (count, size)))


@dataclass
class _Forward:
    """One forward of the tower, with the running attention module's arguments and projections."""

    packing: Packing
    bounds: Tensor | None = None
    rotary: Any = None
    outputs: list[Tensor] = field(default_factory=list)


def _forward(capture: Capture | None) -> _Forward | None:
    return None if capture is None else capture.pending.get("forward")


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """(patches, heads, head_dim) after rotary embedding of the two halves of head_dim; same dtype.

    Args:
        rotary: cos and sin, (patches, head_dim).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (r.to(wide.dtype)[:, None] for r in rotary)
    a, b = wide.chunk(2, -1)
    return (wide * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def merged_patches(height: int, width: int, side: int) -> Tensor:
    """(cells, side * side) int64: row-major patches of every cell of a height x width grid.

    Patches left over at the end, which fill no cell, are omitted, as convolutions do.
    """
    index = torch.arange(height * width).view(height, width)[: height // side * side, : width // side * side]
    return index.view(height // side, side, width // side, side).transpose(1, 2).reshape(-1, side * side)
