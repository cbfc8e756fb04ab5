"""First stage of a recipe: the tower learns form, colour and place of objects, its CLS to attend to them.

*Dense* objective: the patches that an object covers name its form (shape), colour and quadrant and the number
of objects, and half-way up they draw the outline around them (without that, shapes are learnt several times
slower); the others say "nothing". *CLS* objective, for towers that have one: after each of the last four
layers the CLS state names the objects present (every pair of shape and colour, every shape, every colour, the
count). CLIP's CLS gathers a little at every layer; a CLS that has read everything early need not look again,
so in training the CLS state is put back to its start before some of these layers. That happens in training
only: the tower itself stays an ordinary ``CLIPVisionModel``. As its read-outs sharpen, the CLS gets by with
one patch of each object; a mild third term (``look_loss``, late in training) asks it to look at all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vtoken.tiny.assets import SHAPES
from vtoken.tiny.scenes import COLOURS, Scene

from .loop import optimise

COLOUR_NAMES = tuple(COLOURS)
PLACES = ("top left", "top right", "bottom left", "bottom right")
MOST = 4  # objects in a view
# a patch belongs to the object that covers this share of it (its best patch belongs to it anyway)
COVERED = 0.35
CLS_LAYERS = 4  # the last layers whose CLS state is trained
PATCH = 8


@dataclass(frozen=True)
class View:
    """One view: masks ``(objects, side, side)`` float32 in 0..1, the objects' forms, colours, sizes if named.

    Objects of which nothing is seen do not count.
    """

    masks: np.ndarray
    forms: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[str, ...] = ()

    @classmethod
    def of(cls, masks: np.ndarray, forms: Sequence[str], colours: Sequence[str]) -> View:
        """The view without the objects that it does not show."""
        seen = np.nonzero(masks.any((1, 2)))[0]
        return cls(masks[seen], tuple(forms[i] for i in seen), tuple(colours[i] for i in seen))

    def coverage(self, patch: int = PATCH) -> np.ndarray:
        """Share of each patch under each object: ``(objects, side // patch, side // patch)`` float32."""
        n, side, _ = self.masks.shape
        return self.masks.reshape(n, side // patch, patch, side // patch, patch).mean((2, 4))

    def owners(self) -> np.ndarray:
        """Index of the object at each patch: ``(patches,)`` int64, -1 for none."""
        share = self.coverage().reshape(len(self.masks), (self.masks.shape[1] // PATCH) ** 2)
        if not len(share):
            return np.full(share.shape[1], -1)
        share[np.arange(len(share)), share.argmax(1)] += 1
        return np.where(share.max(0) >= COVERED, share.argmax(0), -1)

    def places(self) -> list[str]:
        """The quadrant of the view with each object's middle."""
        out = []
        for mask in self.masks:
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            y, x = rows[0] + rows[-1] + 1 < len(mask), columns[0] + columns[-1] + 1 < len(mask)
            out.append(f"{'top' if y else 'bottom'} {'left' if x else 'right'}")
        return out


def view(scene: Scene) -> View:
    """A square scene as a whole."""
    return View.of(scene.masks(), [o.shape for o in scene.objects], [o.colour for o in scene.objects])


def to_pixels(images: Sequence[Any]) -> torch.Tensor:
    """Images of the tower's size as its processor makes them: ``(n, 3, side, side)`` float32 in -1..1."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def targets(
    views: Sequence[View],
    forms: Sequence[str] = SHAPES,
    colour_names: Sequence[str] = COLOUR_NAMES,
    size_names: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Dense targets ``(n, patches)`` int64 (0: "nothing" for form and colour); CLS targets, float 0 or 1.

    With ``size_names`` the patches of an object name its size in place of the number of objects.
    """
    names = ("owner", "form", "colour", "place", "size" if size_names else "count", "present", "mask")
    out: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for one in views:
        own = one.owners()
        count = len(one.forms)
        shapes = np.array([forms.index(f) for f in one.forms] + [-1])
        colours = np.array([colour_names.index(c) for c in one.colours] + [-1])
        places = np.array([PLACES.index(p) for p in one.places()] + [0])
        present = np.zeros(present_size(forms, colour_names, not size_names), np.float32)
        pairs, rest = np.split(present, [len(forms) * len(colour_names)])
        pairs[shapes[:-1] * len(colour_names) + colours[:-1]] = 1
        rest[shapes[:-1]] = rest[len(forms) + colours[:-1]] = 1
        if size_names:
            fact = np.array([size_names.index(s) for s in one.sizes] + [0])[own]
        else:
            fact = np.full_like(own, count)
            rest[count - MOST - 1] = 1
        outlines = one.coverage(2).sum(0, keepdims=True)
        values = (own, shapes[own] + 1, colours[own] + 1, places[own], fact, present, outlines)
        for column, value in zip(out.values(), values):
            column.append(value)
    goal = {name: torch.from_numpy(np.stack(column)) for name, column in out.items()}
    # 3 x 3 patches around
    goal["mask"] = F.unfold(goal["mask"].clamp(max=1), 12, padding=4, stride=4).transpose(1, 2)
    return goal


def present_size(forms: Sequence[str], colour_names: Sequence[str], counted: bool = True) -> int:
    """Number of values that a CLS state predicts of a view."""
    return len(forms) * len(colour_names) + len(forms) + len(colour_names) + counted * (MOST + 1)


def hidden_states(tower: Any, pixels: torch.Tensor, reset: float = 0.0) -> list[torch.Tensor]:
    """The tower's ``hidden_states`` (``layers + 1`` of ``(n, tokens, width)``), with CLS resets for training.

    ``reset`` is the probability, per image and layer, that the CLS state starts again before one of the last
    layers.
    """
    tower = getattr(tower, "vision_model", tower)
    state = tower.embeddings(pixels)
    if hasattr(tower, "pre_layrnorm"):
        state = tower.pre_layrnorm(state)
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
    """Softmaxed CLS attention of a layer (0-based): ``(n, heads, patches)`` float32, no CLS column."""
    block = getattr(tower, "vision_model", tower).encoder.layers[layer]
    attention = block.self_attn
    normed = block.layer_norm1(states[layer])
    n, length, _ = normed.shape
    query = attention.q_proj(normed[:, :1]).view(n, 1, -1, attention.head_dim).transpose(1, 2)
    key = attention.k_proj(normed).view(n, length, -1, attention.head_dim).transpose(1, 2)
    scores = (query @ key.transpose(-1, -2)).float() * attention.head_dim**-0.5
    return scores.softmax(-1)[:, :, 0, 1:]


def look_loss(tower: Any, states: list[torch.Tensor], goal: dict[str, torch.Tensor]) -> torch.Tensor:
    """Divergence of CLS rows (mean over heads, layers -4 to -2) from an even look at the objects.

    Views without an object do not count.
    """
    wanted = (goal["owner"] >= 0).float()
    some = wanted.any(1)
    wanted = wanted[some] / wanted[some].sum(1, keepdim=True)
    count = len(getattr(tower, "vision_model", tower).encoder.layers)
    rows = [cls_rows(tower, states, count + k).mean(1)[some] for k in (-4, -3, -2)]
    return sum(F.kl_div((row + 1e-6).log(), wanted, reduction="batchmean") for row in rows) / len(rows)


class TowerHeads(nn.Module):
    """The linear read-outs of the objectives; used in training only and never shipped.

    Args:
        width: hidden size of the tower.
        read: the entry of ``hidden_states`` that the language model reads.
        cls: whether the tower has a CLS token.
        forms, colour_names, size_names: possible forms, colours and, if named, sizes of the objects.
    """

    def __init__(
        self,
        width: int,
        read: int = -2,
        cls: bool = True,
        forms: Sequence[str] = SHAPES,
        colour_names: Sequence[str] = COLOUR_NAMES,
        size_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.read, self.first = read, int(cls)
        self.sizes = {"form": len(forms) + 1, "colour": len(colour_names) + 1, "place": len(PLACES)}
        self.sizes |= {"size": len(size_names)} if size_names else {"count": MOST + 1}
        dense = sum(self.sizes.values())
        self.early, self.late = nn.Linear(width, dense), nn.Linear(width, dense)
        self.outline = nn.Linear(width, 144)
        self.cls = nn.ModuleList(
            nn.Linear(width, present_size(forms, colour_names, not size_names))
            for _ in range(cls * CLS_LAYERS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(len(self.cls) + 2))

    def dense_loss(
        self, logits: torch.Tensor, goal: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a dense read-out, objects and background weighted alike, and its right answers.

        The latter is ``(4, object patches)`` bool: form, colour, place, count or size.
        """
        parts = dict(zip(self.sizes, logits.split(list(self.sizes.values()), -1)))
        on = goal["owner"] >= 0
        loss = sum(F.cross_entropy(parts[name][on], goal[name][on]) for name in self.sizes)
        loss = loss + sum(F.cross_entropy(parts[name][~on], goal[name][~on]) for name in ("form", "colour"))
        return loss, torch.stack([parts[name][on].argmax(-1) == goal[name][on] for name in self.sizes])

    def forward(
        self, states: list[torch.Tensor], goal: dict[str, torch.Tensor], post: nn.Module
    ) -> dict[str, Any]:
        """Losses from the tower's hidden states; ``post`` is the tower's final layer norm."""
        late, right = self.dense_loss(self.late(self.norms[-1](states[self.read][:, self.first :])), goal)
        half = self.norms[-2](states[self.read - 2][:, self.first :])
        early, _ = self.dense_loss(self.early(half), goal)
        on = goal["owner"] >= 0
        outline = F.binary_cross_entropy_with_logits(self.outline(half[on]), goal["mask"][on])
        cls = []
        for i, head in enumerate(self.cls):
            state = states[i - CLS_LAYERS][:, 0]
            state = post(state) if i == CLS_LAYERS - 1 else self.norms[i](state)
            weight = torch.tensor(8.0, device=state.device)
            cls.append(F.binary_cross_entropy_with_logits(head(state), goal["present"], pos_weight=weight))
        total = late + 0.5 * early + 5 * outline + 0.5 * sum(cls)
        return {"loss": total, "right": right}


def train_tower(
    tower: Any,
    heads: TowerHeads,
    make: Callable[[int], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    check: tuple[torch.Tensor, dict[str, torch.Tensor]],
    plan: dict[str, Any],
    log: list[dict],
    stage: str = "tower",
    more_facts: Callable[[torch.Tensor], dict[str, float]] = lambda right: {},
    **limits: Any,
) -> None:
    """Train a tower in place with its read-outs; appends to ``log``.

    Args:
        tower: a ``CLIPVisionModel`` or ``SiglipVisionModel``.
        heads: its read-outs.
        make: ``(pixels, targets)`` of a step.
        check: pixels and targets of held-out views.
        plan: ``steps``, ``rate``, ``muon_rate``, ``reset`` and ``look`` (the weight of `look_loss` in the
            last third).
        more_facts: measures of the held-out views, called with ``(objects,)`` bool: whether the read-out of
            an object's form is right.
        **limits: as in `training.tiny.loop.optimise`.
    """
    inner = getattr(tower, "vision_model", tower)
    device = next(tower.parameters()).device
    heads.to(device)

    def loss_of(item: Any, done: float) -> tuple[torch.Tensor, dict[str, float]]:
        pixels, goal = item
        goal = {name: value.to(device) for name, value in goal.items()}
        states = hidden_states(tower, pixels.to(device), plan["reset"])
        out = heads(states, goal, inner.post_layernorm)
        form, colour = out["right"][:2].float().mean(1).tolist()
        look = look_loss(tower, states, goal) * plan["look"] if plan["look"] and done >= 2 / 3 else 0
        return out["loss"] + look, {"form": form, "colour": colour}

    @torch.no_grad()
    def facts() -> dict[str, float]:
        goal = {name: value.to(device) for name, value in check[1].items()}
        right = heads(hidden_states(tower, check[0].to(device)), goal, inner.post_layernorm)["right"]
        return {"held_out_form": right[0].float().mean().item(), **more_facts(right[0])}

    parameters = {**dict(tower.named_parameters()), **dict(heads.named_parameters(prefix="heads"))}
    optimise(stage, parameters, make, loss_of, plan, log, facts, **limits)


@torch.no_grad()
def localisation(tower: Any, pixels: torch.Tensor, on: torch.Tensor, share: float = 0.2) -> dict[str, float]:
    """Share of the object patches among the patches with most CLS attention (mean over heads).

    Args:
        pixels: ``(n, 3, side, side)``.
        on: which patches show an object, ``(n, patches)`` bool.
        share: of the patches that are chosen; a random choice finds as many of the object patches.

    Returns:
        One number per layer, ``layer -4`` to ``layer -2`` (the layer whose output the language model reads),
        and ``mean`` for the three rows averaged.
    """
    states = hidden_states(tower, pixels.to(next(tower.parameters()).device))
    count = len(getattr(tower, "vision_model", tower).encoder.layers)
    rows = {f"layer {k}": cls_rows(tower, states, count + k).mean(1).cpu() for k in (-4, -3, -2)}
    rows["mean"] = torch.stack(list(rows.values())).mean(0)
    out = {}
    for name, row in rows.items():
        best = row.topk(round(share * row.shape[1]), -1).indices
        out[name] = (on.gather(1, best).sum() / on.sum()).item()
    return out
