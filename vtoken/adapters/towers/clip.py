"""CLIP and SigLIP towers: separate q/k projections over a batch of equal grids."""

from __future__ import annotations

from .base import Tower
from .blocks import Block, SplitBlock


class SiglipTower(Tower):
    """SigLIP vision transformer: patches only."""

    equal_grids = True
    rows_are_frames = True

    def block(self, layer: int) -> Block:
        return SplitBlock(self.layers[layer])


class ClipTower(SiglipTower):
    """CLIP vision transformer: token 0 is the class token."""

    has_cls = True
