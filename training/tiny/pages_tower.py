"""First stage of the recipe of pages: the patches of a text name it and the text that it belongs to.

Patches of an entry name the entry itself and its partner, the number of a word or the word of a number;
after the first layers they name the entry, and after the very first the letters that they show. Two heads are
asked to look at the partner (`partner_loss`): without that it is learnt late or never. What the layers add
soon is many times as long as the positions, so patches also name their row and column. The CLS state after
each of the last layers names the words on the page, and its attention is asked to cover the text evenly
(`training.tiny.tower.look_loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vtoken.tiny.letters import LETTERS
from vtoken.tiny.pages import CELL, FIGURES, SIDE, WORDS, Page

from .loop import optimise
from .tower import CLS_LAYERS, hidden_states, look_loss

ENTRIES = ("", *WORDS, *FIGURES)  # the first is "none"
RELATIONS = ("text", "partner")  # fields of an entry
GRID = SIDE // CELL
_NUMBER = {text: i for i, text in enumerate(ENTRIES)}
_LETTER = {letter: i for i, letter in enumerate(LETTERS)}
_PLACED = (2, 3, 4)  # layers before the read-outs of row and column
_EARLY = 2  # layers before the first read-out of entries


def covers(page: Page) -> np.ndarray:
    """Which patches show each entry: ``(entries, 16, 16)`` bool; no patch shows two."""
    edges = np.arange(GRID) * CELL
    boxes = np.array([entry.box for entry in page.entries])[:, :, None]
    wide = (edges + CELL > boxes[:, 0]) & (edges < boxes[:, 2])
    tall = (edges + CELL > boxes[:, 1]) & (edges < boxes[:, 3])
    return tall[:, :, None] & wide[:, None]


def targets(pages: Sequence[Page]) -> dict[str, torch.Tensor]:
    """Targets of the read-outs of some pages.

    Returns:
        ``owner``: index of the entry at each patch, ``(n, 256)`` int64, -1 for none;
        each of ``RELATIONS``: index into ``ENTRIES``, ``(n, 256)`` int64, 0 for none;
        ``mate``: index of the partner's entry at each patch, ``(n, 256)`` int64, -1 for none;
        ``letters``: the two letters of each patch, ``(n, 256, 2)`` int64, 0 for none;
        ``present``: the words on the page, ``(n, 32)`` float32.
    """
    out: dict[str, list[np.ndarray]] = {
        name: [] for name in ("owner", "mate", *RELATIONS, "letters", "present")
    }
    for page in pages:
        shown = covers(page).reshape(len(page.entries), -1)
        owner = np.where(shown.any(0), shown.argmax(0), -1)
        out["owner"].append(owner)
        numbers = {entry.text: i for i, entry in enumerate(page.entries)}
        mates = np.array([numbers[entry.partner] for entry in page.entries])
        out["mate"].append(np.where(owner >= 0, mates[owner], -1))
        for name in RELATIONS:
            known = np.array([_NUMBER[getattr(entry, name)] for entry in page.entries])
            out[name].append(np.where(owner >= 0, known[owner], 0))
        letters = np.zeros((GRID**2, 2), np.int64)
        for at in np.nonzero(owner >= 0)[0]:
            entry = page.entries[owner[at]]
            first = 2 * (at % GRID - entry.box[0] // CELL)
            letters[at] = [_LETTER[letter] for letter in entry.text.upper()[first : first + 2]]
        out["letters"].append(letters)
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
        self.letters = nn.Linear(width, 2 * len(LETTERS))
        self.places = nn.ModuleList(nn.Linear(width, 2 * GRID) for _ in _PLACED)
        self.cls = nn.ModuleList(nn.Linear(width, len(WORDS)) for _ in range(CLS_LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(CLS_LAYERS + 2))

    def forward(
        self, states: list[torch.Tensor], goal: dict[str, torch.Tensor], post: nn.Module
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and for each relation which text patches' read-outs are right, from hidden states.

        ``post`` is the tower's final layer norm.
        """
        on = goal["owner"] >= 0
        late, half = self.norms[-1](states[self.read][:, 1:]), self.norms[-2](states[_EARLY][:, 1:])
        right, shown, loss = {}, late[on], torch.zeros((), device=on.device)
        for name in RELATIONS:
            logits = self.maps[name](shown) @ self.entries.T
            loss = loss + F.cross_entropy(logits, goal[name][on])
            right[name] = logits.argmax(-1) == goal[name][on]
        empty = self.maps["text"](late[~on]) @ self.entries.T
        loss = loss + 0.5 * F.cross_entropy(empty, goal["text"][~on])
        early = self.maps["early"](half[on]) @ self.entries.T
        loss = loss + F.cross_entropy(early, goal["text"][on])
        letters = self.letters(F.layer_norm(states[1][:, 1:][on], half.shape[-1:]))
        letters = letters.unflatten(-1, (2, -1)).flatten(0, 1)
        loss = loss + F.cross_entropy(letters, goal["letters"][on].flatten())
        place = torch.stack(
            [torch.arange(GRID**2, device=on.device) // GRID, torch.arange(GRID**2, device=on.device) % GRID]
        )
        for depth, head in zip(_PLACED, self.places):
            said = head(F.layer_norm(states[depth][:, 1:], half.shape[-1:])).unflatten(-1, (2, GRID))
            loss = loss + 0.5 * F.cross_entropy(said.flatten(0, 2), place.T.expand(len(on), -1, -1).flatten())
        right["early"] = early.argmax(-1) == goal["text"][on]
        right["letters"] = letters.argmax(-1) == goal["letters"][on].flatten()
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
        tower: a ``CLIPVisionModel`` of 256 px and 16 px patches.
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

    def loss_of(item: Any, done: float) -> tuple[torch.Tensor, dict[str, float]]:
        pixels, goal = item
        goal = {name: value.to(device) for name, value in goal.items()}
        states = hidden_states(tower, pixels.to(device), plan["reset"])
        loss, right = heads(states, goal, inner.post_layernorm)
        missed, right["looked"] = partner_loss(tower, states, goal)
        loss = loss + missed
        if plan["look"] and done >= 1 / 3:
            loss = loss + plan["look"] * look_loss(tower, states, goal)
        return loss, {name: part.float().mean().item() for name, part in right.items()}

    @torch.no_grad()
    def facts() -> dict[str, float]:
        goal = {name: value.to(device) for name, value in check[1].items()}
        states = hidden_states(tower, check[0].to(device))
        _, right = heads(states, goal, inner.post_layernorm)
        right["looked"] = partner_loss(tower, states, goal)[1]
        shares = {f"held_out_{name}": part.float().mean().item() for name, part in right.items()}
        return shares | more_facts()

    parameters = {**dict(tower.named_parameters()), **dict(heads.named_parameters(prefix="heads"))}
    optimise("tower", parameters, make, loss_of, plan, log, facts, **limits)


_LOOKS = (3, 4)  # layers whose first head looks left, from numbers, and whose second looks right, from words
_AWAY = (-2.0, 2.0)  # columns at which these two heads start to look
_SHARP = 3.0
_LONGER = 2.5  # than the positions of `start_tower`, beside the long vectors that the layers add


def partner_loss(
    tower: Any, states: list[torch.Tensor], goal: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence of two heads' attention from the partner's patches, and its share there per text patch."""
    inner = getattr(tower, "vision_model", tower)
    wanted = (goal["owner"][:, None] == goal["mate"][..., None]) & (goal["mate"] >= 0)[..., None]
    number = goal["text"] > len(WORDS)
    shares = []
    for depth in _LOOKS:
        layer = inner.encoder.layers[depth]
        attention, size = layer.self_attn, layer.self_attn.head_dim
        normed = layer.layer_norm1(states[depth])
        query, key = (
            F.linear(normed, part.weight[: 2 * size], part.bias[: 2 * size]).unflatten(-1, (2, size))
            for part in (attention.q_proj, attention.k_proj)
        )
        rows = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * size**-0.5).softmax(-1)[:, :, 1:, 1:]
        share = (rows * wanted[:, None]).sum(-1)
        shares.append(torch.where(number, share[:, 0], share[:, 1])[goal["mate"] >= 0])
    found = torch.stack(shares)
    return -found.clamp(min=1e-20).log().mean(), found


def _waves(at: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    angles = at[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


@torch.no_grad()
def start_neighbours(tower: Any, pixels: torch.Tensor) -> None:
    """Start the heads of `partner_loss` as heads that look left and right in the same row, in place.

    Query and key are fitted (least squares) on the states of images, ``pixels`` ``(n, 3, side, side)``, so
    that their product is a sum of cosines of the distance from the wanted place. Values stay. The positions
    are made longer first.
    """
    inner = getattr(tower, "vision_model", tower)
    inner.embeddings.position_embedding.weight[1:] *= _LONGER
    cells = torch.arange(GRID**2).repeat(len(pixels))
    column, row = (cells % GRID).float(), (cells // GRID).float()
    width = inner.config.hidden_size
    waves = 30.0 ** -(torch.arange(width // 4) / (width // 4))  # as in `training.tiny.models.start_tower`
    for depth in _LOOKS:
        layer = inner.encoder.layers[depth]
        attention, size = layer.self_attn, layer.self_attn.head_dim
        state = layer.layer_norm1(hidden_states(tower, pixels)[depth])[:, 1:].flatten(0, 1)
        known = torch.cat([state, torch.ones(len(state), 1)], 1)
        gram = known.T @ known + 1e-3 * len(known) * torch.eye(known.shape[1])
        for head, away in enumerate(_AWAY):
            for moved, at, rates, place in (
                (away, column, waves[size // 4 : size // 2], head * size),
                (0.0, row, waves[: size // 4], head * size + size // 2),
            ):
                for projection, by in ((attention.q_proj, moved), (attention.k_proj, 0.0)):
                    wanted = _waves(at + by, rates) * (_SHARP * size**0.5) ** 0.5
                    fitted = torch.linalg.solve(gram, known.T @ wanted)
                    rows = slice(place, place + size // 2)
                    projection.weight[rows], projection.bias[rows] = fitted[:-1].T, fitted[-1]
