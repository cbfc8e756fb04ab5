"""Features of the tokens as the vision tower gives them to the projector, for methods that compare these."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ...tokens import Needs, TowerInfo, VisualTokens
from .grouping import local_cells, rows_per_segment

Vision = Literal["tower", "projected"]


def vision_needs(vision: Vision, tower: TowerInfo | None) -> Needs:
    """Declare the tower's output for the projector; nothing for the projected features."""
    if vision == "projected":
        return Needs()
    return Needs(states=(0,) if tower is None else (tower.feature_layer,), grid=True)


def vision_features(tokens: VisualTokens, vision: Vision) -> list[Tensor]:
    """Per segment the features of its tokens, (fed, C), in the order of `rows_per_segment`.

    Of the tower, a token has the mean of the patches of its cell.
    """
    rows = rows_per_segment(tokens)
    if vision == "projected":
        return [tokens.features[mine] for mine in rows]
    assert tokens.tower is not None
    out = []
    states = tokens.states(tokens.tower.feature_layer)[:, -1]  # (segments, rows, columns, C)
    for segment, patches, cells in zip(tokens.segments, states, local_cells(tokens, rows), strict=True):
        maps = F.adaptive_avg_pool2d(patches.float().movedim(-1, 0)[None], segment.grid)
        out.append(maps[0].flatten(1).mT[cells])
    return out
