"""First stage of the recipe of pages: the patches of a text name it and the texts that it goes with.

Patches of an entry name the entry itself, the word that it belongs to, the word above its column and the
entry on its left; half-way up they name the entry, after the second layer the letters around them and after
the first their own. The read-outs of entries share one embedding of words and numbers, from which the
language model's embeddings start: so the projector has one simple map to learn per relation instead of a
hundred pairs of words. The CLS state after each of the last layers names the words on the page, and its
attention is asked to cover the text evenly (`training.tiny.tower.look_loss`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vtoken.tiny.letters import LETTERS
from vtoken.tiny.pages import FIGURES, SIDE, WORDS, Page

from .loop import optimise
from .tower import CLS_LAYERS, PATCH, hidden_states, look_loss

ENTRIES = ("", *WORDS, *FIGURES)  # the first is "none"
RELATIONS = ("text", "word", "head", "left")  # fields of an entry
GRID = SIDE // PATCH
_NUMBER = {text: i for i, text in enumerate(ENTRIES)}
_LETTER = {letter: i for i, letter in enumerate(LETTERS)}
AROUND = (-3, -2, -1, 1, 2, 3)  # columns
_HELD = 0.25  # share of the steps in which the heads of `start_neighbours` are fitted again and again
_HALF = 3  # layers before the read-out half-way up


def covers(page: Page) -> np.ndarray:
    """Which patches show each entry: ``(entries, 24, 24)`` bool; no patch shows two."""
    edges = np.arange(GRID) * PATCH
    boxes = np.array([entry.box for entry in page.entries])[:, :, None]
    wide = (edges + PATCH > boxes[:, 0]) & (edges < boxes[:, 2])
    tall = (edges + PATCH > boxes[:, 1]) & (edges < boxes[:, 3])
    return tall[:, :, None] & wide[:, None]


def targets(pages: Sequence[Page]) -> dict[str, torch.Tensor]:
    """Targets of the read-outs of some pages.

    Returns:
        ``owner``: index of the entry at each patch, ``(n, 576)`` int64, -1 for none;
        each of ``RELATIONS``: index into ``ENTRIES``, ``(n, 576)`` int64, 0 for none;
        ``letters``: of each patch, ``(n, 576)`` int64, 0 for none;
        ``around``: letters of the patches ``AROUND`` it, ``(n, 576, 6)`` int64, 0 for none, else one more;
        ``present``: the words on the page, ``(n, 40)`` float32.
    """
    names = ("owner", *RELATIONS, "letters", "around", "present")
    out: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for page in pages:
        shown = covers(page).reshape(len(page.entries), -1)
        owner = np.where(shown.any(0), shown.argmax(0), -1)
        out["owner"].append(owner)
        for name in RELATIONS:
            known = np.array([_NUMBER[getattr(entry, name)] for entry in page.entries])
            out[name].append(np.where(owner >= 0, known[owner], 0))
        letters = np.zeros(GRID**2, np.int64)
        for at in np.nonzero(owner >= 0)[0]:
            entry = page.entries[owner[at]]
            letters[at] = _LETTER[entry.text.upper()[at % GRID - entry.box[0] // PATCH]]
        out["letters"].append(letters)
        grid = np.pad(np.where(owner >= 0, letters + 1, 0).reshape(GRID, GRID), ((0, 0), (3, 3)))
        around = [grid[:, 3 + away : 3 + away + GRID].flatten() for away in AROUND]
        out["around"].append(np.stack(around, 1))
        texts = {entry.text for entry in page.entries}
        out["present"].append(np.array([word in texts for word in WORDS], np.float32))
    return {name: torch.from_numpy(np.stack(parts)) for name, parts in out.items()}


class PageHeads(nn.Module):
    """The read-outs of the tower; used in training only and never shipped.

    Args:
        width: hidden size of the tower.
        read: the entry of ``hidden_states`` that the language model reads.
    """

    def __init__(self, width: int, read: int = -2) -> None:
        super().__init__()
        self.read = read
        self.entries = nn.Parameter(torch.randn(len(ENTRIES), width) * 0.1)
        self.maps = nn.ModuleDict({name: nn.Linear(width, width) for name in (*RELATIONS, "early")})
        self.letters = nn.Linear(width, len(LETTERS))
        self.cls = nn.ModuleList(nn.Linear(width, len(WORDS)) for _ in range(CLS_LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(CLS_LAYERS + 2))
        self.around = nn.Linear(width, len(AROUND) * (len(LETTERS) + 1))

    def forward(
        self, states: list[torch.Tensor], goal: dict[str, torch.Tensor], post: nn.Module
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and for each relation which text patches' read-outs are right, from hidden states.

        ``post`` is the tower's final layer norm.
        """
        on = goal["owner"] >= 0
        late, half = self.norms[-1](states[self.read][:, 1:]), self.norms[-2](states[_HALF][:, 1:])
        right, shown, loss = {}, late[on], torch.zeros((), device=on.device)
        for name in RELATIONS:
            logits = self.maps[name](shown) @ self.entries.T
            loss = loss + (1.0 if name == "text" else 0.5) * F.cross_entropy(logits, goal[name][on])
            right[name] = logits.argmax(-1) == goal[name][on]
        empty = self.maps["text"](late[~on]) @ self.entries.T
        early = self.maps["early"](half[on]) @ self.entries.T
        letters = self.letters(F.layer_norm(states[1][:, 1:][on], half.shape[-1:]))
        loss = loss + 0.5 * F.cross_entropy(empty, goal["text"][~on])
        loss = loss + F.cross_entropy(early, goal["text"][on])
        loss = loss + F.cross_entropy(letters, goal["letters"][on])
        spelt = self.around(F.layer_norm(states[2][:, 1:][on], half.shape[-1:])).unflatten(
            -1, (len(AROUND), -1)
        )
        loss = loss + 3 * F.cross_entropy(spelt.flatten(0, 1), goal["around"][on].flatten())
        right["around"] = spelt.argmax(-1) == goal["around"][on]
        right["early"] = early.argmax(-1) == goal["text"][on]
        right["letters"] = letters.argmax(-1) == goal["letters"][on]
        for i, head in enumerate(self.cls):
            state = states[i - CLS_LAYERS][:, 0]
            state = post(state) if i == CLS_LAYERS - 1 else self.norms[i](state)
            loss = loss + 0.25 * F.binary_cross_entropy_with_logits(head(state), goal["present"])
        return loss, right


def train_tower(
    tower: Any,
    heads: PageHeads,
    make: Callable[[int], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    check: tuple[torch.Tensor, dict[str, torch.Tensor]],
    plan: dict[str, Any],
    log: list[dict],
    more_facts: Callable[[], dict[str, float]],
    **limits: Any,
) -> None:
    """Train a CLIP tower in place with its read-outs; appends to ``log``.

    Args:
        tower: a ``CLIPVisionModel`` of 192 px and 8 px patches.
        heads: its read-outs.
        make: pixels and `targets` of a step.
        check: pixels and targets of held-out pages.
        plan: ``steps``, ``rate``, ``muon_rate``, ``reset`` and ``look`` (the weight of ``look_loss`` in the
            last two thirds).
        more_facts: further held-out measures.
        **limits: as in `training.tiny.loop.optimise`.
    """
    inner = getattr(tower, "vision_model", tower)
    device = next(tower.parameters()).device
    heads.to(device)
    steps = itertools.count()

    def loss_of(item: Any, done: float) -> tuple[torch.Tensor, dict[str, float]]:
        pixels, goal = item
        if done < _HELD and next(steps) % 20 == 0:
            start_neighbours(tower, pixels.to(device))
        goal = {name: value.to(device) for name, value in goal.items()}
        states = hidden_states(tower, pixels.to(device), plan["reset"])
        loss, right = heads(states, goal, inner.post_layernorm)
        if plan["look"] and done >= 1 / 3:
            loss = loss + plan["look"] * look_loss(tower, states, goal)
        return loss, {name: part.float().mean().item() for name, part in right.items()}

    @torch.no_grad()
    def facts() -> dict[str, float]:
        goal = {name: value.to(device) for name, value in check[1].items()}
        _, right = heads(hidden_states(tower, check[0].to(device)), goal, inner.post_layernorm)
        shares = {f"held_out_{name}": part.float().mean().item() for name, part in right.items()}
        return shares | more_facts()

    parameters = {**dict(tower.named_parameters()), **dict(heads.named_parameters(prefix="heads"))}
    optimise("tower", parameters, make, loss_of, plan, log, facts, **limits)


# per layer (0-based) and head: columns and rows away, and how sharply; None: as far as the content says
_STARTS = {
    1: ((-1, 0), (1, 0), (-2, 0), (2, 0)),
    2: ((-1, 0), (1, 0), (-3, 0), (3, 0)),
    3: ((-4, 0), (None, 0), (0, None), None),
    4: ((-4, 0), (None, 0), (0, None), None),
}
_KEPT = (1, 2)  # layers whose queries and keys are not trained: Muon would change what they look at
_SHARP = 3.0
_LONGER = 2.5  # than the positions of `start_tower`, beside the long vectors that the layers add


def _waves(at: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    angles = at[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


@torch.no_grad()
def start_neighbours(tower: Any, pixels: torch.Tensor, longer: bool = False) -> None:
    """Start heads of the tower as heads that look at neighbours, along rows or along columns, in place.

    A letter tells little without the next one, and a patch takes long to find its neighbours itself. Query
    and key are fitted (least squares) on the states of images, ``pixels`` ``(n, 3, side, side)``, so that
    their product is a sum of cosines of the distance from the wanted place. Values stay. In the layers
    ``_KEPT`` queries and keys are not trained from then on. ``longer`` makes the positions longer first.
    """
    inner = getattr(tower, "vision_model", tower)
    if longer:
        inner.embeddings.position_embedding.weight[1:] *= _LONGER
    cells = torch.arange(GRID**2).repeat(len(pixels))
    column, row = (cells % GRID).float(), (cells // GRID).float()
    width = inner.config.hidden_size
    waves = 30.0 ** -(torch.arange(width // 4) / (width // 4))  # as in `training.tiny.models.start_tower`
    for depth, heads in _STARTS.items():
        layer = inner.encoder.layers[depth]
        attention, size = layer.self_attn, layer.self_attn.head_dim
        state = layer.layer_norm1(hidden_states(tower, pixels)[depth])[:, 1:].flatten(0, 1)
        known = torch.cat([state, torch.ones(len(state), 1)], 1)
        gram = known.T @ known + 1e-3 * len(known) * torch.eye(known.shape[1])
        for head, start in enumerate(heads):
            first = head * size
            for away, at, place in zip(start or (), (column, row), (0, size // 2)):
                if away is None:
                    continue
                rates = waves[size // 4 : size // 2] if abs(away) > 3 else waves[: size // 4]
                for projection, moved in ((attention.q_proj, away), (attention.k_proj, 0)):
                    wanted = _waves(at + moved, rates) * (_SHARP * size**0.5) ** 0.5
                    fitted = torch.linalg.solve(gram, known.T @ wanted)
                    rows = slice(first + place, first + place + size // 2)
                    projection.weight[rows], projection.bias[rows] = fitted[:-1].T, fitted[-1]
        if depth in _KEPT:
            for projection in (attention.q_proj, attention.k_proj):
                projection.requires_grad_(False)
