"""The Pixtral tower: images of any size in one sequence; an image does not see the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .packed import PackedTower, Packing, merged_patches


class PixtralTower(PackedTower):
    """Pixtral vision transformer.

    Args:
        merge_size: side of the square of patches that the projector merges into one cell.
    """

    def __init__(
        self,
        module: nn.Module,
        feature_layer: int,
        pool: Callable[[Tensor], Tensor] | None = None,
        merge_size: int = 1,
    ) -> None:
        self.merge_size = merge_size
        super().__init__(module, feature_layer, pool)

    def find_layers(self) -> list[nn.Module]:
        return list(self.module.transformer.layers)  # type: ignore[union-attr, arg-type]

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].attention  # type: ignore[return-value]

    def packing(self, args: Any, kwargs: dict[str, Any]) -> Packing:
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        sizes = kwargs["image_sizes"] if "image_sizes" in kwargs else args[1] if len(args) > 1 else None
        if sizes is None:
            sizes = [pixels.shape[-2:]] * len(pixels)
        patch: Any = self.module.patch_size
        grids = [(int(h) // patch, int(w) // patch) for h, w in sizes]
        bounds = torch.tensor([0] + [h * w for h, w in grids]).cumsum(0)
        patches = [merged_patches(h, w, self.merge_size) for h, w in grids]
        index = torch.cat([p + start for p, start in zip(patches, bounds[:-1], strict=True)])
        cells = [(h // self.merge_size, w // self.merge_size) for h, w in grids]
        items = [(1, len(p)) for p in patches]
        return Packing(items, index.to(pixels.device), cells, bounds.to(pixels.device))

    def query_key(self, layer: int, outputs: list[Tensor]) -> Iterable[Tensor]:
        return (x[0].unflatten(-1, (-1, int(self.attention(layer).head_dim))) for x in outputs)  # type: ignore[arg-type]
