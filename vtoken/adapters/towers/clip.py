"""CLIP and SigLIP towers: separate q/k projections over a batch of equal grids."""

from __future__ import annotations

from .base import Tower


class ClipTower(Tower):
    """CLIP vision transformer: token 0 is the class token."""

    has_cls = True
    equal_grids = True


class SiglipTower(Tower):
    """SigLIP vision transformer: patches only."""

    equal_grids = True
