"""Parts of the last stages of the recipe of pages: how they start, what is asked, where it is answered.

Answers alone teach slowly which of a hundred texts a question means, and so does the attention target of
cluttered scenes. So the projector starts as a sum of two embeddings (`start_projector`), three heads start as
those of a look-up (`start_reading`), and two of them are asked to look, from the end of the prompt, where the
answer is read, at the patches of the text that the question names; or at the start of the prompt, if it is
not on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vtoken.tiny.pages import Page, questions
from vtoken.tiny.scenes import Question

from .language import choose_kinds
from .loop import optimise
from .pages_tower import ENTRIES, RELATIONS, targets
from .tower import hidden_states

SLOTS = 16  # questions per page
WIDTH = 9  # tokens per question: "which number belongs to tree ? assistant : 47"
WANTED = {"number": 6, "word": 5, "exists": 5}
CARRY = 0  # layer whose first head takes the text of a question to its end
LOOKS = (2, 3)  # layers whose first head looks for it
_SLOW = 2e-3  # radians per token: angles of the rotary positions that turn little over the image
_SHARP, _CARRIED, _OFF = 1.5, 0.8, 1.5  # lengths of queries and keys
_SMALL, _ADDED = 0.1, 0.3  # shares of what the layers add at first, and of what these heads add


def choose(page: Page, rng: np.random.Generator) -> list[Question]:
    """Sixteen questions about a page in drawn wordings, of all kinds."""
    return choose_kinds(questions(page, rng), rng, WANTED, SLOTS)


def look_targets(pages: Sequence[Page], asked: Sequence[Sequence[Question]]) -> dict[str, torch.Tensor]:
    """The goal of `training.tiny.looking.Look`: where each prompt ends, the patches of what it names."""
    owners = targets(pages)["owner"].numpy()
    at = np.full((len(pages), SLOTS), -1)
    shows = np.zeros((len(pages), SLOTS, owners.shape[1]), bool)
    for i, (page, some) in enumerate(zip(pages, asked)):
        numbers = {entry.text: k for k, entry in enumerate(page.entries)}
        for slot, question in enumerate(some):
            text = question.text.rstrip("?.").split()  # the last is the text that it names
            at[i, slot] = slot * WIDTH + len(text) + 2  # then come the mark, "assistant" and ":"
            shows[i, slot] = owners[i] == numbers.get(text[-1], -2)
    return {"at": torch.from_numpy(at), "shows": torch.from_numpy(shows)}


class Codes:
    """What the language model starts from: directions for texts, a mark of all of them, and a rotation.

    Args:
        width: hidden size of the language model.

    Attributes:
        texts: unit vectors of words and numbers, ``(122, width)``, at right angles to ``mark``.
        mark: unit vector that the embedding of every text holds too.
        turn: rotation of what a visual token holds of a partner, ``(width, width)``.
    """

    def __init__(self, width: int) -> None:
        self.turn = _orthogonal(width, width)
        self.mark = F.normalize(torch.randn(width), dim=0)
        drawn = torch.randn(len(ENTRIES) - 1, width)
        self.texts = F.normalize(drawn - (drawn @ self.mark)[:, None] * self.mark, dim=1)


def _orthogonal(rows: int, width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, rows))[0].T


@torch.no_grad()
def start_reading(model: Any, vocabulary: dict[str, int], codes: Codes) -> None:
    """Start three things in the language model that the answers teach slowly, in place.

    The embeddings of words and numbers, in and out, are those of ``codes``. A head of layer ``CARRY`` takes
    the text of a question to the end of its prompt. A head of each of ``LOOKS`` looks at what holds the same
    text and reads its partner. Queries and keys use the slow angles of the rotary positions alone. What the
    layers add starts small.
    """
    language = model.model.language_model
    embedding, size = model.get_input_embeddings().weight, language.layers[0].self_attn.head_dim
    for layer in language.layers:
        layer.self_attn.o_proj.weight *= _SMALL
        layer.mlp.down_proj.weight *= _SMALL
    ids = torch.tensor([vocabulary[text] for text in ENTRIES[1:]])
    length = embedding.norm(dim=1).mean()
    embedding[ids] = length * (codes.texts + codes.mark)
    model.lm_head.weight[ids] = length * codes.texts
    slow = (language.rotary_emb.inv_freq < _SLOW).nonzero()[:, 0]
    slow = torch.cat([slow, slow + size // 2])
    texts = _orthogonal(size, embedding.shape[1])
    end = F.normalize(embedding[vocabulary[":"]], dim=0)
    for off in (codes.mark, end):
        texts -= (texts @ off)[:, None] * off
    carry, *looking = (language.layers[i].self_attn for i in (CARRY, *LOOKS))
    for attention in (carry, *looking):
        attention.q_proj.weight[:size] = attention.k_proj.weight[:size] = 0
    carry.q_proj.weight[slow], carry.k_proj.weight[slow] = (
        _CARRIED * v.expand(len(slow), -1) / len(slow) ** 0.5 for v in (end, codes.mark)
    )
    carry.v_proj.weight[:size], carry.o_proj.weight[:, :size] = texts, _ADDED * texts.T
    for attention in looking:  # what a prompt's end holds is in the prompt too: the first angle keeps it off
        attention.q_proj.weight[slow[0]], attention.k_proj.weight[slow[0]] = (
            _OFF * end,
            -_OFF * (end + codes.mark),
        )
        attention.q_proj.weight[slow[1:]] = attention.k_proj.weight[slow[1:]] = _SHARP * texts[1 : len(slow)]
        attention.v_proj.weight[:size] = texts @ codes.turn
        attention.o_proj.weight[:, :size] = _ADDED * texts.T


def start_projector(
    model: Any,
    pages: tuple[torch.Tensor, dict[str, torch.Tensor]],
    check: tuple[torch.Tensor, dict[str, torch.Tensor]],
    codes: Codes,
    plan: dict[str, Any],
    log: list[dict],
    **limits: Any,
) -> None:
    """Teach the projector to name text and partner by the language model's codes, in place.

    A visual token comes to hold the code of the text that it shows plus that of its partner, turned.

    Args:
        model: with a trained tower.
        pages, check: pixels and targets of pages of the training split, and of held-out pages.
        codes: those of `start_reading`.
        plan: ``steps``, ``batch`` (pages), ``rate``, ``muon_rate``.
        log: as in `training.tiny.loop.optimise`, and so are the limits.
    """
    projector, known, turn = model.model.multi_modal_projector, codes.texts, codes.turn
    size = model.get_input_embeddings().weight.detach().norm(dim=1).mean()
    mine, theirs = (_cached(model, *some) for some in (pages, check))
    with torch.no_grad():  # the tower's output has no norm after it
        projector.linear_1.weight /= mine[0].std()

    def loss_of(item: tuple[torch.Tensor, ...], done: float) -> tuple[torch.Tensor, dict[str, float]]:
        state, text, partner = (part.flatten(0, 1) for part in item)
        out, on, facts = projector(state) / size, text >= 0, {}
        wanted = torch.where(on[:, None], known[text] + known[partner] @ turn, 0)
        loss = (out - wanted).square().sum(-1).mean()
        for name, held, aim in (("text", out, text), ("partner", out @ turn.T, partner)):
            logits = 10 * held[on] @ known.T
            loss = loss + F.cross_entropy(logits, aim[on])
            facts[name] = (logits.argmax(-1) == aim[on]).float().mean().item()
        return loss, facts

    def make(step: int) -> tuple[torch.Tensor, ...]:
        which = np.random.Generator(np.random.PCG64(step)).integers(len(mine[0]), size=plan["batch"])
        return tuple(part[which] for part in mine)

    @torch.no_grad()
    def facts() -> dict[str, float]:
        return {f"held_out_{name}": value for name, value in loss_of(theirs, 1.0)[1].items()}

    optimise("projector", dict(projector.named_parameters()), make, loss_of, plan, log, facts, **limits)


@torch.no_grad()
def _cached(model: Any, pixels: torch.Tensor, goal: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What the projector reads of some pages, ``(n, 256, width)``, and text and partner, -1 for none."""
    states = [hidden_states(model.model.vision_tower, part)[-2][:, 1:] for part in pixels.split(8)]
    return torch.cat(states), *(goal[name] - 1 for name in RELATIONS)
