"""The tower of Gemma 4: a batch of images of any shape, patches with coordinates and padding at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .packed import PackedTower, Packing


class GemmaTower(PackedTower):
    """Gemma 4's vision transformer, with norms after its projections and a rotary embedding per axis.

    Args:
        side: the side of the square of patches that is pooled into one cell.
    """

    def __init__(self, module: nn.Module, feature_layer: int, side: int) -> None:
        self.side = side
        super().__init__(module, feature_layer)

    def find_layers(self) -> list[nn.Module]:
        return list(self.module.encoder.layers)  # type: ignore[union-attr, arg-type]

    def num_heads(self) -> int:
        return int(self.module.config.num_attention_heads)  # type: ignore[union-attr, arg-type]

    def scale(self, layer: int) -> float:
        return float(self.attention(layer).scaling)  # type: ignore[arg-type]

    def projections(self, layer: int) -> tuple[nn.Module, ...]:
        attention: Any = self.attention(layer)
        return attention.q_norm, attention.k_norm

    def packing(self, args: Any, kwargs: dict[str, Any]) -> Packing:
        positions, side = kwargs["pixel_position_ids"], self.side
        items, patches, grids, bounds = [], [], [], [0]
        for first, place in zip(
            range(0, positions[..., 0].numel(), positions.shape[1]), positions, strict=True
        ):
            x, y = place[(place >= 0).all(-1)].unbind(-1)
            columns, rows = (int(axis.max() + 1) // side for axis in (x, y))
            cell = y // side * columns + x // side
            order = torch.argsort((cell * side + y % side) * side + x % side)
            patches.append(first + order.view(rows * columns, side * side))
            items.append((1, rows * columns))
            grids.append((rows, columns))
            bounds += [first + len(x), first + len(place)]  # padding is a window of its own
        windows = torch.tensor(bounds, device=positions.device).unique_consecutive()
        return Packing(items, torch.cat(patches), grids, windows)

    def rotary(self, kwargs: dict[str, Any]) -> Any:
        return tuple(_halves(table) for table in kwargs["position_embeddings"])

    def query_key(self, layer: int, outputs: list[Tensor]) -> Iterable[Tensor]:
        return (_halves(x) for x in outputs)

    def frame_grids(self, args: Any, kwargs: dict[str, Any]) -> list[tuple[int, int]]:
        last = kwargs["pixel_position_ids"].amax(1) + 1
        return [(rows, columns) for columns, rows in last.tolist()]


def _halves(x: Tensor) -> Tensor:
    """(images, patches, ..., d) -> (images * patches, ..., d), so ordered that both axes turn in halves."""
    return x.flatten(0, 1).unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)
