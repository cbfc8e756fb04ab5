"""First stage of the tiny Qwen2.5-VL: tower and merger, whose merged cells learn to name their objects.

The tower's own ``forward`` takes one flat sequence and goes through its windows one by one. Training has many
images of one size, so the same weights are applied here to a batch; a test holds the two together.

The merged cells (16 x 16 px, what the language model reads) that an object covers name its shape or digit,
its colour and the number of objects; half-way up, the patches of an object name it too and draw its outline.
This tower does not learn where an object is: its rotary positions are relative, and the language model's
M-RoPE gives the place of a cell.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vtoken.tiny.assets import SHAPES
from vtoken.tiny.clip_moments import WHITE, Camera, draw_object
from vtoken.tiny.digits import DIGITS
from vtoken.tiny.scenes import COLOURS, SIZE, SPLITS, Scene, make_scene

from .loop import optimise

OBJECTS = (*SHAPES, *DIGITS)
COLOUR_NAMES = (*COLOURS, WHITE)
IMAGE_SIDE = 160  # px: the processor enlarges scenes to this
# a patch or cell belongs to the object whose box covers this share of it (its best one does anyway)
COVERED = 0.3


def windows(side: int, width: int) -> tuple[torch.Tensor, list[int]]:
    """The order in which the tower arranges ``side * side`` cells, and the number of cells in each window."""
    cells = torch.arange(side * side).view(side, side)
    parts = [block.flatten() for rows in cells.split(width) for block in rows.split(width, dim=1)]
    return torch.cat(parts), [len(part) for part in parts]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def encode(tower: Any, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the tower to square images of one size.

    Args:
        tower: a ``Qwen2_5_VisionTransformerPretrainedModel``.
        patches: ``(n, patches, channels * frames * patch * patch)``, one temporal patch per row, in the order
            of the image processor.

    Returns:
        Merged cells ``(n, cells, out_hidden_size)`` row by row, and the patches half-way up ``(n, patches,
        hidden_size)`` in the processor's order.
    """
    n, count, _ = patches.shape
    config, unit = tower.config, tower.spatial_merge_unit
    side = round((count // unit) ** 0.5)
    order, sizes = windows(side, config.window_size // (config.patch_size * config.spatial_merge_size))
    index = (order[:, None] * unit + torch.arange(unit)).flatten()
    sizes = [unit * size for size in sizes]
    cell, corner, merge = index // unit, index % unit, config.spatial_merge_size
    where = torch.stack([cell // side * merge + corner // merge, cell % side * merge + corner % merge], 1)
    angles = (
        (where[..., None] * tower.rotary_pos_emb.inv_freq.cpu()).flatten(1).repeat(1, 2).to(patches.device)
    )
    cos, sin = angles.cos(), angles.sin()

    def attend(layer: Any, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        query, key, value = layer.qkv(x).view(n, count, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        parts = zip(*(t.split(sizes, 2) for t in (_rotate(query, cos, sin), _rotate(key, cos, sin), value)))
        out = torch.cat([F.scaled_dot_product_attention(*some) for some in parts], 2)
        return layer.proj(out.transpose(1, 2).reshape(n, count, -1))

    x = F.linear(patches, tower.patch_embed.proj.weight.flatten(1))[:, index]
    half = x
    for depth, block in enumerate(tower.blocks):
        x = x + attend(block.attn, block.norm1(x), [count] if depth in tower.fullatt_block_indexes else sizes)
        x = x + block.mlp(block.norm2(x))
        if depth == len(tower.blocks) // 2:
            half = x
    merged = tower.merger(x.flatten(0, 1)).view(n, count // unit, -1)
    return merged[:, order.argsort()], half[:, index.argsort()]


def start(tower: Any) -> None:
    """Starting weights for a small tower, in place: unit-scale attention, biased to look around.

    A constant part of query and key, turned by the rotary positions, prefers one offset: a patch finds its
    neighbours before it knows what to look for.
    """
    width, inner = tower.config.hidden_size, tower.config.intermediate_size
    with torch.no_grad():
        tower.patch_embed.proj.weight.normal_(std=0.05)
        for block in tower.blocks:
            block.attn.qkv.weight.normal_(std=width**-0.5)
            block.attn.qkv.bias[: 2 * width].normal_()
            block.attn.proj.weight.normal_(std=0.3 * width**-0.5)
            for part in (block.mlp.gate_proj, block.mlp.up_proj):
                part.weight.normal_(std=width**-0.5)
            block.mlp.down_proj.weight.normal_(std=0.3 * inner**-0.5)
        for part in (tower.merger.mlp[0], tower.merger.mlp[2]):
            part.weight.normal_(std=part.in_features**-0.5)


def crowd(seed: int, split: str = "train", bent: bool = False) -> tuple[list[Any], Scene]:
    """Two frames as in a clip, but with up to four digits and shapes at once, and the objects on them.

    A clip shows one or two things at a time; a tower learns to read them faster from more. ``bent``: none
    like another.
    """
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split), 8]))
    camera, colours = Camera(rng, split), tuple(COLOURS)
    objects = []
    for quadrant in rng.permutation(4)[: 4 - int(rng.integers(8)) // 3]:  # 2 to 4
        digit = rng.integers(2)
        name = DIGITS[int(rng.integers(len(DIGITS)))] if digit else SHAPES[int(rng.integers(len(SHAPES)))]
        colour = WHITE if digit else colours[int(rng.integers(len(colours)))]
        objects.append(draw_object(rng, split, name, colour, int(quadrant), bent))
    frames = [camera.frame(i, objects) for i in range(2)]
    return frames, Scene(frames[0], tuple(objects), seed, split, camera.name)


def owners(scene: Scene, side: int) -> np.ndarray:
    """Index of the object that each of ``side * side`` cells belongs to: ``(cells,)`` int64, -1 for none."""
    if not scene.objects:
        return np.full(side * side, -1)
    edges = np.arange(side + 1) * SIZE / side
    share = np.zeros((len(scene.objects), side * side))
    for row, item in zip(share, scene.objects):
        across, down = (
            (np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)).clip(0) * side / SIZE
            for low, high in (item.box[::2], item.box[1::2])
        )
        row[:] = np.outer(down, across).flatten()
        row[row.argmax()] += 1
    return np.where(share.max(0) >= COVERED, share.argmax(0), -1)


def _cell_order(x: torch.Tensor, side: int) -> torch.Tensor:
    """``(n, side * side, ...)`` patches from raster order to the processor's: cell by cell, four each."""
    index = torch.arange(side * side).view(side // 2, 2, side // 2, 2).permute(0, 2, 1, 3).flatten()
    return x[:, index]


def targets(scenes: list[Scene], side: int) -> dict[str, torch.Tensor]:
    """Targets for images of ``side * side`` patches.

    ``cell_*`` are ``(n, cells)`` int64 row by row, ``patch_*`` are ``(n, patches)`` in the processor's order;
    0 is "nothing", ``count`` is -100 there. ``outline`` is ``(n, patches, 144)`` float: 3 x 3 patches at 4 x
    4 points each.
    """
    columns: dict[str, list[np.ndarray]] = {
        f"{a}_{b}": [] for a in ("cell", "patch") for b in ("object", "colour")
    }
    columns["cell_count"] = []
    for scene in scenes:
        names = np.array([0, *(OBJECTS.index(o.shape) + 1 for o in scene.objects)])
        colours = np.array([0, *(COLOUR_NAMES.index(o.colour) + 1 for o in scene.objects)])
        for level, cells in (("cell", side // 2), ("patch", side)):
            own = owners(scene, cells) + 1
            columns[f"{level}_object"].append(names[own])
            columns[f"{level}_colour"].append(colours[own])
            if level == "cell":
                columns["cell_count"].append(np.where(own > 0, len(scene.objects), -100))
    goal = {name: torch.from_numpy(np.stack(column)) for name, column in columns.items()}
    masks = torch.from_numpy(np.stack([scene.masks().max(0, keepdims=True) for scene in scenes]))
    masks = F.adaptive_avg_pool2d(masks, 4 * side)
    goal["outline"] = F.unfold(masks, 12, padding=4, stride=4).transpose(1, 2)
    return {name: _cell_order(g, side) if name[0] in "po" else g for name, g in goal.items()}


class DenseHeads(nn.Module):
    """The linear read-outs; used in training only and never shipped."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.sizes = {"object": len(OBJECTS) + 1, "colour": len(COLOUR_NAMES) + 1, "count": 5}
        self.late, self.early = (nn.Linear(w, sum(self.sizes.values())) for w in (out, width))
        self.outline = nn.Linear(width, 144)
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in (out, width))

    def read(
        self, logits: torch.Tensor, goal: dict[str, torch.Tensor], level: str
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Loss of a read-out, objects and background weighted alike, and its right object cells."""
        loss, right = logits.new_zeros(()), []
        for name, part in zip(self.sizes, logits.split(list(self.sizes.values()), -1)):
            if f"{level}_{name}" not in goal:
                continue
            want = goal[f"{level}_{name}"]
            on = want > 0
            loss = loss + F.cross_entropy(part[on], want[on])
            if name != "count":
                loss = loss + F.cross_entropy(part[~on], want[~on])
            right.append(part[on].argmax(-1) == want[on])
        return loss, right

    def forward(
        self, merged: torch.Tensor, half: torch.Tensor, goal: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss of a batch and, per read-out, its right object cells."""
        late, right = self.read(self.late(self.norms[0](merged)), goal, "cell")
        half = self.norms[1](half)
        early, _ = self.read(self.early(half), goal, "patch")
        on = goal["patch_object"] > 0
        outline = F.binary_cross_entropy_with_logits(self.outline(half[on]), goal["outline"][on])
        return late + 0.5 * early + 5 * outline, right


def image_patches(processor: Any, some: list[Scene]) -> torch.Tensor:
    """Scenes cut as by the image processor: ``(n, 400, 384)``."""
    pixels = processor.image_processor(images=[scene.image for scene in some], return_tensors="pt")[
        "pixel_values"
    ]
    return pixels.view(len(some), -1, pixels.shape[-1])


def video_patches(frames: np.ndarray) -> torch.Tensor:
    """Frames ``(n, 96, 96, 3)`` uint8 cut as by the video processor: ``(n / 2, 144, 384)`` float32."""
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    side = frames.shape[1] // 16
    x = x.view(-1, 2, 3, side, 2, 8, side, 2, 8).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(len(frames) // 2, side * side * 4, -1)


def tower_batch(
    processor: Any, plan: dict[str, Any], first: int, step: int, split: str = "train"
) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Patches and targets of a step: crowded pairs of frames, and scenes in image size."""
    size, count = plan["batch"], plan["scenes"]
    start = first + step * size
    pairs = [crowd(start + i, split) for i in range(size - count)]
    some = [make_scene(start + i, split) for i in range(count)]
    frames = np.stack([np.asarray(frame) for frames, _ in pairs for frame in frames])
    return [
        (video_patches(frames), targets([scene for _, scene in pairs], SIZE // 8)),
        (image_patches(processor, some), targets(some, IMAGE_SIDE // 8)),
    ]


def train_tower(
    model: Any,
    processor: Any,
    plan: dict[str, Any],
    log: list[dict],
    first: int,
    checks: int = 5,
    **limits: Any,
) -> None:
    """Stage one, in place; appends to ``log``.

    Args:
        plan: ``batch`` images per step, ``scenes`` of them at the size of images; the rest as in `optimise`.
        first: number of the first scene.
        checks: held-out batches of the measures along the way.
        **limits: as in `training.tiny.loop.optimise`.
    """
    tower, device = model.model.visual, model.device
    heads = DenseHeads(tower.config.hidden_size, tower.config.out_hidden_size).to(device)

    def loss_of(item: Any, done: float = 0) -> tuple[torch.Tensor, dict[str, float]]:
        total, facts = 0, {}
        for name, (patches, goal) in zip(("frame", "image"), item):
            goal = {key: value.to(device) for key, value in goal.items()}
            loss, right = heads(*encode(tower, patches.to(device)), goal)
            total = total + loss / 2
            facts[f"{name}_objects"] = right[0].float().mean().item()
            facts[f"{name}_count"] = right[2].float().mean().item()
        return total, facts

    @torch.no_grad()
    def facts() -> dict[str, float]:
        found = [loss_of(tower_batch(processor, plan, 7_000_000, i, "test"))[1] for i in range(checks)]
        return {f"held_out_{name}": float(np.mean([f[name] for f in found])) for name in found[0]}

    parameters = {f"tower.{n.replace('blocks', 'layers')}": p for n, p in tower.named_parameters()}
    parameters |= dict(heads.named_parameters(prefix="heads"))
    make = partial(tower_batch, processor, plan, first)
    optimise("tower", parameters, make, loss_of, plan, log, facts, **limits)
