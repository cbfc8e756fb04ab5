"""Stage one of a recipe: a CLIP tower that knows what is where, and whose CLS attends to it.

Two objectives. *Dense*: the patches that an object covers name its shape, colour and quadrant and the number of
objects, and half-way up they draw the outline around them (without that, shapes are learnt several times slower); the
others say "nothing". *CLS*: after each of the last four layers the CLS state names the objects present
(every pair of shape and colour, every shape, every colour, the count). CLIP's CLS gathers a little at every layer; a
CLS that has read everything early need not look again, so in training the CLS state is put back to its start before
some of these layers. That happens in training only: the tower itself stays an ordinary ``CLIPVisionModel``. As its
read-outs sharpen, the CLS gets by with one patch of each object; a mild third term (``look_loss``, late in training)
asks it to look at all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .assets import SHAPES
from .scenes import COLOURS, Scene, make_scene

COLOUR_NAMES = tuple(COLOURS)
PLACES = ("top left", "top right", "bottom left", "bottom right")
COVERED = 0.35  # a patch belongs to the object that covers this share of it (its best patch belongs to it anyway)
CLS_LAYERS = 4  # the last layers whose CLS state is trained


def owners(scene: Scene, patch: int = 8) -> np.ndarray:
    """Which object owns each patch: ``(patches,)`` int64, -1 for none."""
    share = scene.coverage(patch).reshape(len(scene.objects), -1)
    share[np.arange(len(share)), share.argmax(1)] += 1
    return np.where(share.max(0) >= COVERED, share.argmax(0), -1)


def to_pixels(scenes: list[Scene]) -> torch.Tensor:
    """What the processor makes of the images: ``(n, 3, 96, 96)`` float32 in -1..1."""
    stacked = np.stack([np.asarray(scene.image) for scene in scenes])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def targets(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Dense targets ``(n, patches)`` int64 (0 is "nothing" for shape and colour) and CLS targets as float 0/1."""
    names = ("owner", "shape", "colour", "place", "count", "present", "mask")
    out: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for scene in scenes:
        own = owners(scene)
        shapes = np.array([SHAPES.index(o.shape) for o in scene.objects])
        colours = np.array([COLOUR_NAMES.index(o.colour) for o in scene.objects])
        places = np.array([PLACES.index(o.place) for o in scene.objects])
        present = np.zeros(len(SHAPES) * len(COLOURS) + len(SHAPES) + len(COLOURS) + 3, np.float32)
        pairs, rest = np.split(present, [len(SHAPES) * len(COLOURS)])
        pairs[shapes * len(COLOURS) + colours] = 1
        rest[shapes] = rest[len(SHAPES) + colours] = rest[len(scene.objects) - 5] = 1
        values = (
            own,
            np.where(own < 0, 0, shapes[own] + 1),
            np.where(own < 0, 0, colours[own] + 1),
            places[own],
            np.full_like(own, len(scene.objects) - 2),
            present,
            scene.coverage(2).sum(0, keepdims=True),
        )
        for column, value in zip(out.values(), values):
            column.append(value)
    goal = {name: torch.from_numpy(np.stack(column)) for name, column in out.items()}
    goal["mask"] = F.unfold(goal["mask"], 12, padding=4, stride=4).transpose(1, 2)  # 3 x 3 patches around each
    return goal


def batch(first: int, size: int, split: str = "train") -> tuple[list[Scene], torch.Tensor, dict[str, torch.Tensor]]:
    """Scenes ``first .. first + size - 1`` with pixels and targets."""
    scenes = [make_scene(first + i, split) for i in range(size)]
    return scenes, to_pixels(scenes), targets(scenes)


def hidden_states(tower: Any, pixels: torch.Tensor, reset: float = 0.0) -> list[torch.Tensor]:
    """The tower's ``hidden_states`` (``layers + 1`` of ``(n, 1 + patches, width)``), with CLS resets for training.

    ``reset`` is the probability, per image and layer, that the CLS state starts again before one of the last layers.
    """
    tower = getattr(tower, "vision_model", tower)
    state = tower.pre_layrnorm(tower.embeddings(pixels))
    start, states = state[:, :1], [state]
    for depth, layer in enumerate(tower.encoder.layers):
        if reset and depth > len(tower.encoder.layers) - CLS_LAYERS:
            again = torch.rand(len(state), 1, 1, device=state.device) < reset
            state = torch.cat([torch.where(again, start, state[:, :1]), state[:, 1:]], 1)
        state = layer(state, None)
        state = state[0] if isinstance(state, tuple) else state
        states.append(state)
    return states


def cls_rows(tower: Any, states: list[torch.Tensor], layer: int) -> torch.Tensor:
    """Softmaxed CLS attention of a layer (0-based): ``(n, heads, patches)`` float32, the CLS column dropped."""
    block = getattr(tower, "vision_model", tower).encoder.layers[layer]
    attention = block.self_attn
    normed = block.layer_norm1(states[layer])
    n, length, _ = normed.shape
    query = attention.q_proj(normed[:, :1]).view(n, 1, -1, attention.head_dim).transpose(1, 2)
    key = attention.k_proj(normed).view(n, length, -1, attention.head_dim).transpose(1, 2)
    scores = (query @ key.transpose(-1, -2)).float() * attention.head_dim**-0.5
    return scores.softmax(-1)[:, :, 0, 1:]


def look_loss(tower: Any, states: list[torch.Tensor], goal: dict[str, torch.Tensor]) -> torch.Tensor:
    """Divergence of the CLS rows (mean over heads) of layers -4 to -2 from an even look at the object patches."""
    wanted = (goal["owner"] >= 0).float()
    wanted = wanted / wanted.sum(1, keepdim=True)
    count = len(getattr(tower, "vision_model", tower).encoder.layers)
    rows = [cls_rows(tower, states, count + k).mean(1) for k in (-4, -3, -2)]
    return sum(F.kl_div((row + 1e-6).log(), wanted, reduction="batchmean") for row in rows) / len(rows)


class TowerHeads(nn.Module):
    """The linear read-outs of the two objectives; used in training only and never shipped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = {"shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "place": len(PLACES), "count": 3}
        dense, present = sum(self.sizes.values()), len(SHAPES) * len(COLOURS) + len(SHAPES) + len(COLOURS) + 3
        self.early, self.late = nn.Linear(width, dense), nn.Linear(width, dense)
        self.outline = nn.Linear(width, 144)
        self.cls = nn.ModuleList(nn.Linear(width, present) for _ in range(CLS_LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(CLS_LAYERS + 2))

    def dense_loss(self, logits: torch.Tensor, goal: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a dense read-out, objects and background weighted alike, and its accuracy on object patches."""
        parts = dict(zip(self.sizes, logits.split(list(self.sizes.values()), -1)))
        on = goal["owner"] >= 0
        loss = sum(F.cross_entropy(parts[name][on], goal[name][on]) for name in self.sizes)
        loss = loss + sum(F.cross_entropy(parts[name][~on], goal[name][~on]) for name in ("shape", "colour"))
        right = [parts[name][on].argmax(-1) == goal[name][on] for name in ("shape", "colour", "place", "count")]
        return loss, torch.stack([r.float().mean() for r in right])

    def forward(self, states: list[torch.Tensor], goal: dict[str, torch.Tensor], post: nn.Module) -> dict[str, Any]:
        """Losses from the tower's hidden states; ``post`` is the tower's final layer norm."""
        late, accuracy = self.dense_loss(self.late(self.norms[-1](states[-2][:, 1:])), goal)
        half = self.norms[-2](states[-4][:, 1:])
        early, _ = self.dense_loss(self.early(half), goal)
        on = goal["owner"] >= 0
        outline = F.binary_cross_entropy_with_logits(self.outline(half[on]), goal["mask"][on])
        cls = []
        for i in range(CLS_LAYERS):
            state = states[i - CLS_LAYERS][:, 0]
            state = post(state) if i == CLS_LAYERS - 1 else self.norms[i](state)
            weight = torch.tensor(8.0, device=state.device)
            cls.append(F.binary_cross_entropy_with_logits(self.cls[i](state), goal["present"], pos_weight=weight))
        total = late + 0.5 * early + 5 * outline + 0.5 * sum(cls)
        return {"loss": total, "dense": late, "outline": outline, "cls": torch.stack(cls), "accuracy": accuracy}


@torch.no_grad()
def localisation(tower: Any, scenes: list[Scene], share: float = 0.2) -> dict[str, float]:
    """Share of the object patches among the patches with most CLS attention (mean over heads).

    Returns one number per layer, ``layer -4`` to ``layer -2`` (the layer whose output the language model reads), and
    ``mean`` for the three rows averaged. A random choice scores ``share``; ``share`` of the patches are chosen.
    """
    device = next(tower.parameters()).device
    states = hidden_states(tower, to_pixels(scenes).to(device))
    count = len(getattr(tower, "vision_model", tower).encoder.layers)
    rows = {f"layer {k}": cls_rows(tower, states, count + k).mean(1).cpu() for k in (-4, -3, -2)}
    rows["mean"] = torch.stack(list(rows.values())).mean(0)
    on = torch.from_numpy(np.stack([owners(scene) for scene in scenes])) >= 0
    out = {}
    for name, row in rows.items():
        best = row.topk(round(share * row.shape[1]), -1).indices
        out[name] = (on.gather(1, best).sum() / on.sum()).item()
    return out
