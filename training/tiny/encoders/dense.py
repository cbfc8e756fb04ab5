"""Read-outs of the patches, used in training only, and starting weights of the towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vtoken.tiny.assets import SHAPES
from vtoken.tiny.digits import DIGITS
from vtoken.tiny.scenes import COLOURS, Scene

FORMS = (*SHAPES, *DIGITS)
TINTS = (*COLOURS, "white")
COVER = 0.15  # share of a patch that an object must cover
FINE = 4  # points of an outline along the side of a patch
Goal = tuple[torch.Tensor, torch.Tensor]


def moved(item: Any, device: torch.device) -> Any:
    """A batch (tensors in tuples, lists and dictionaries) on a device."""
    if isinstance(item, dict):
        return {name: moved(value, device) for name, value in item.items()}
    return (
        tuple(moved(value, device) for value in item) if isinstance(item, (tuple, list)) else item.to(device)
    )


def owners(masks: np.ndarray, patch: int) -> np.ndarray:
    """The object that each patch shows: ``(patches,)`` int64, row by row, -1 for none.

    ``masks`` are `Scene.masks`, ``(objects, height, width)``.
    """
    objects, height, width = masks.shape
    if not objects:
        return np.full((height // patch) * (width // patch), -1)
    cover = masks.reshape(objects, height // patch, patch, width // patch, patch).mean((2, 4))
    cover = cover.reshape(objects, -1)
    return np.where(cover.max(0) > COVER, cover.argmax(0), -1)


def targets(scenes: Sequence[Scene], patch: int) -> Goal:
    """Form and colour of every patch, ``(scenes, patches, 2)`` int64 and -1 without an object, and outlines.

    The outlines are those of the 3 x 3 patches around each patch, ``(scenes, patches, 144)`` float32 in 0..1.
    """
    rows, covers = [], []
    for scene in scenes:
        masks = scene.masks()
        forms = np.array([FORMS.index(o.shape) for o in scene.objects] + [-1])
        tints = np.array([TINTS.index(o.colour) for o in scene.objects] + [-1])
        own = owners(masks, patch)
        rows.append(np.stack([forms[own], tints[own]], -1))
        covers.append(masks.sum(0))
    fine = F.avg_pool2d(torch.from_numpy(np.stack(covers))[:, None].clamp(max=1), patch // FINE)
    around = F.unfold(fine, 3 * FINE, padding=FINE, stride=FINE).transpose(1, 2)
    return torch.from_numpy(np.stack(rows)), around


class PatchHeads(nn.Module):
    """Linear read-outs of form and colour, one extra class each for the background, and of outlines."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, len(FORMS) + len(TINTS) + 2)
        self.outline = nn.Linear(width, (3 * FINE) ** 2)

    def forward(self, states: torch.Tensor, goal: Goal) -> tuple[torch.Tensor, float]:
        """Loss, objects and background weighted alike, and the share of object patches with the right form.

        Args:
            states: ``(n, patches, width)``.
            goal: from `targets`.
        """
        states, (names, around) = self.norm(states), goal
        form, tint = self.linear(states).split([len(FORMS) + 1, len(TINTS) + 1], -1)
        on = names[..., 0] >= 0
        loss = 5 * F.binary_cross_entropy_with_logits(self.outline(states[on]), around[on])
        for logits, wanted in ((form, names[..., 0]), (tint, names[..., 1])):
            nothing = torch.full_like(wanted[~on], logits.shape[-1] - 1)
            loss = loss + F.cross_entropy(logits[on], wanted[on]) + F.cross_entropy(logits[~on], nothing)
        return loss, (form[on].argmax(-1) == names[on][:, 0]).float().mean().item()


@torch.no_grad()
def start(positions: torch.Tensor, pixels: torch.Tensor, blocks: dict[str, torch.Tensor]) -> None:
    """Starting weights of a small tower with a class token, in place: 2-D sine positions, unit scale.

    As `training.tiny.models.start_tower` does for CLIP towers of transformers.

    Args:
        positions: ``(1 + patches, width)``, the class token first.
        pixels: the weight that embeds patches.
        blocks: parameters of the blocks by name.
    """
    width, side = positions.shape[1], round((len(positions) - 1) ** 0.5)
    rates = 30.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    positions[1:] = 0.5 * torch.cat([rows, columns], -1).flatten(0, 1)
    pixels.normal_(std=0.05)
    for name, weight in blocks.items():
        if name.endswith(("qkv.weight", "in_proj_weight")):
            weight.normal_(std=width**-0.5)
        elif name.endswith(("attn.proj.weight", "out_proj.weight")):
            weight.normal_(std=0.3 * width**-0.5)
