"""What the visual tokens of the tiny Qwen2.5-VL are asked inside its language model, in training only.

The tower sees one pair of frames at a time and does not know where in it a cell is; place, time and company are the
language model's to find out. Answers alone teach that slowly, so after two of its layers every visual token also says

- ``row``, ``column``: in which half of the image it is;
- ``digit``, ``shape``, ``colour``: what is on screen at its time (tokens of objects, once all of it has been read);
- ``so_far``: how many digits have been shown up to it;
- ``shape_before``, ``colour_before``: the last shape shown before this digit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .assets import SHAPES
from .clips import Clip
from .digits import DIGITS
from .qwen_tower import owners
from .scenes import COLOURS

COLOUR_NAMES = tuple(COLOURS)
SIZES = {
    "row": 2,
    "column": 2,
    "digit": len(DIGITS) + 1,  # the last class is "none", also for shape and colour
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "so_far": 5,
    "shape_before": len(SHAPES) + 1,
    "colour_before": len(COLOURS) + 1,
}
LAYERS = (1, 2)  # after these layers of the language model


def places(steps: int, side: int) -> dict[str, np.ndarray]:
    """Targets ``(steps, side * side)`` of ``row`` and ``column``; -100, for "not asked", of the others."""
    half = np.arange(side) * 2 // side
    rows = np.broadcast_to(half[:, None], (side, side)).flatten()
    columns = np.broadcast_to(half, (side, side)).flatten()
    goal = {name: np.full((steps, side * side), -100) for name in SIZES}
    goal["row"][:], goal["column"][:] = rows, columns
    return goal


def clip_targets(clip: Clip, side: int = 6) -> dict[str, np.ndarray]:
    """Targets ``(pairs of frames, side * side)`` of a clip, int64; nothing is asked that the next tokens decide."""
    goal, cells = places(len(clip.media) // 2, side), np.arange(side * side)
    for step, frame in enumerate(range(0, len(clip.media), 2)):
        goal["so_far"][step] = sum(m.start < frame and m.digit is not None for m in clip.moments)
        now = next((m for m in clip.moments if m.start <= frame < m.stop), None)
        if now is None:
            continue
        own = owners(clip.scene(frame), side)
        first = [int((own == i).argmax()) for i in range(len(now.objects))]
        fresh = now.start == frame
        on = (own >= 0) & (cells >= max(first) if fresh else True)
        for name, known, value in (("digit", DIGITS, now.digit), ("shape", SHAPES, now.shape)):
            goal[name][step][on] = len(known) if value is None else known.index(value)
        goal["colour"][step][on] = len(COLOUR_NAMES) if now.colour is None else COLOUR_NAMES.index(now.colour)
        if now.digit is None:
            continue
        if fresh:
            goal["so_far"][step] += cells >= first[0]
        before = [m for m in clip.moments if m.shape is not None and m.start < now.start]
        goal["shape_before"][step][own == 0] = SHAPES.index(before[-1].shape) if before else len(SHAPES)
        goal["colour_before"][step][own == 0] = COLOUR_NAMES.index(before[-1].colour) if before else len(COLOUR_NAMES)
    return goal


def stack(goals: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Targets of several examples of one grid: ``(n, visual tokens)`` int64 each."""
    return {name: torch.from_numpy(np.stack([goal[name].flatten() for goal in goals])) for name in SIZES}


class ReadingHeads(nn.Module):
    """The linear read-outs behind the layers ``LAYERS``; used in training only and never shipped."""

    def __init__(self, model: Any, prefix: int = 3) -> None:
        super().__init__()
        width = model.config.text_config.hidden_size
        self.read = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(SIZES.values()))) for _ in LAYERS
        )
        self.prefix, self.states = prefix, []
        layers = model.model.language_model.layers
        self.hooks = [layers[i].register_forward_hook(self._keep) for i in LAYERS]

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self.hooks:
            hook.remove()

    def _keep(self, layer: nn.Module, args: Any, out: Any) -> None:
        self.states.append(out[0] if isinstance(out, tuple) else out)

    def forward(self, goal: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of what the language model has read since the last call, and the share of right read-outs."""
        count = goal["row"].shape[1]
        loss, right = self.states[0].new_zeros(()), {}
        for read, state in zip(self.read, self.states):
            logits = read(state[:, self.prefix : self.prefix + count])
            for name, part in zip(SIZES, logits.split(list(SIZES.values()), -1)):
                asked = goal[name] >= 0
                if asked.any():
                    loss = loss + F.cross_entropy(part[asked], goal[name][asked])
                    right[name] = (part[asked].argmax(-1) == goal[name][asked]).float().mean().item()
        self.states.clear()
        return loss, right
