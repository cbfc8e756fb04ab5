"""Last stage of a recipe: the projector and the language model learn to answer from the visual tokens.

Several questions (ten by default) share one sequence: ``[user : image][question answer][question
answer]...``. A mask lets each question see the image and itself only, and positions start again after the
image for each, so that every one of them looks exactly like a prompt with a single question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
import torch

from vtoken.tiny.scenes import Question, Scene, questions

from .loop import optimise
from .reading import ReadingHeads
from .tower import hidden_states

Q = TypeVar("Q")  # a question, or a question with what it names
SLOTS = 10  # questions per scene
WIDTH = 10  # tokens per question: the longest is "what shape is the red one ? assistant : star"


def choose(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Ten questions about a scene in drawn wordings: one count, two exists, and seven of the other kinds."""
    pool = questions(scene, rng)
    order = [pool[i] for i in rng.permutation(len(pool))]
    exists = [q for q in order if q.kind == "exists"]
    rest = [q for q in order if q.kind not in ("exists", "count")]
    return [pool[0], *exists[:2], *rest[: SLOTS - 3]]


def pack(
    asked: list[list[Question]], vocabulary: dict[str, int], slots: int = SLOTS, width: int = WIDTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of the question slots: two ``(scenes, slots * width)`` int64, -100 unlabelled.

    Only the answer and the ``</s>`` after it are labelled. Slots beyond the questions of a scene stay empty.
    """
    ids = np.full((len(asked), slots, width), vocabulary["<pad>"])
    labels = np.full_like(ids, -100)
    for row, some in enumerate(asked):
        for slot, question in enumerate(some):
            text = question.text.replace("?", " ?").replace(".", " .")
            prompt = [vocabulary[w] for w in f"{text} assistant :".split()]
            answer = [vocabulary[w] for w in question.answer.split()]
            both = prompt + answer
            ids[row, slot, : len(both)] = both
            labels[row, slot, len(prompt) - 1 : len(both)] = [*answer, vocabulary["</s>"]]
    return tuple(torch.from_numpy(a.reshape(len(asked), -1)) for a in (ids, labels))


def choose_kinds(
    pool: Sequence[Q],
    rng: np.random.Generator,
    wanted: dict[str, int],
    slots: int = SLOTS,
    kind: Callable[[Q], str] = attrgetter("kind"),
) -> list[Q]:
    """``slots`` questions of a pool, drawn: as many of each kind as ``wanted`` says if possible, then any."""
    order = [pool[i] for i in rng.permutation(len(pool))]
    first = [q for name, n in wanted.items() for q in [q for q in order if kind(q) == name][:n]]
    return (first + [q for q in order if q not in first])[:slots]


def layout(
    image_tokens: int = 144, prefix: int = 2, slots: int = SLOTS, width: int = WIDTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive mask ``(1, 1, n, n)`` float32 and positions ``(1, n)`` int64 of a packed sequence."""
    start = prefix + image_tokens
    group = torch.cat([torch.full((start,), -1), torch.arange(slots).repeat_interleave(width)])
    causal = torch.ones(len(group), len(group)).tril().bool()
    seen = causal & ((group[:, None] == group[None]) | (group[None] == -1))
    position = torch.cat([torch.arange(start), (start + torch.arange(width)).repeat(slots)])
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    return mask[None, None], position[None]


def answer_loss(
    model: Any,
    visual: torch.Tensor,
    ids: torch.Tensor,
    labels: torch.Tensor,
    user: list[int],
    width: int = WIDTH,
    position: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the answers, and the share of right answer tokens.

    Args:
        model: has ``model.language_model`` and ``lm_head``.
        visual: visual tokens ``(n, tokens, hidden)`` as the language model reads them, after the projector.
        ids, labels: from `pack`.
        user: token ids before the visual tokens.
        width: tokens per question, as in `pack`.
        position: positions for the language model instead of those of `layout`; ``(..., n or 1, length)``.
    """
    device = visual.device
    ids, labels = ids.to(device), labels.to(device)
    embed = model.get_input_embeddings()
    before = embed(torch.tensor(user, device=device)).expand(len(ids), -1, -1)
    mask, plain = layout(visual.shape[1], len(user), ids.shape[1] // width, width)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([before, visual, embed(ids)], 1),
        attention_mask=mask.to(device).expand(len(ids), -1, -1, -1),
        position_ids=(plain if position is None else position).to(device),
        use_cache=False,
    ).last_hidden_state[:, -ids.shape[1] :]
    told = labels >= 0
    logits = model.lm_head(hidden[told])
    loss = torch.nn.functional.cross_entropy(logits, labels[told])
    return loss, (logits.argmax(-1) == labels[told]).float().mean()


def visual_tokens(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Visual tokens ``(n, tokens, hidden)`` of a LLaVA on a CLIP tower; no gradient for the tower."""
    inner = model.model
    with torch.no_grad():
        states = hidden_states(inner.vision_tower, pixels.to(model.device))
    return inner.multi_modal_projector(states[model.config.vision_feature_layer][:, 1:])


def train_language(
    model: Any,
    visual_of: Callable[[Any], torch.Tensor],
    make: Callable[[int], tuple[Any, ...]],
    checks: Sequence[tuple[Any, ...]],
    plan: dict[str, Any],
    log: list[dict],
    user: list[int],
    stage: str = "language",
    width: int = WIDTH,
    reading: ReadingHeads | None = None,
    **limits: Any,
) -> None:
    """Train everything but the tower, in place; appends to ``log``.

    Args:
        model: a LLaVA-like model.
        visual_of: pictures of a batch -> visual tokens ``(n, tokens, hidden)``, with the gradient of the
            projector.
        make: pictures of the batch of a step, its packed questions and, with ``reading``, the targets of the
            read-outs.
        checks: held-out batches.
        plan: ``steps``, ``rate``, ``muon_rate``.
        user: token ids before the visual tokens.
        width: tokens per question, as in `pack`.
        reading: asks the visual tokens too, where a batch has targets for them (a third item), with the
            weight ``plan["reading"]``.
        **limits: as in `training.tiny.loop.optimise`.
    """

    def loss_of(item: Any, done: float) -> tuple[torch.Tensor, dict[str, float]]:
        shown, (ids, labels), *goals = item
        loss, right = answer_loss(model, visual_of(shown), ids, labels, user, width)
        facts = {"answers": right.item()}
        if reading:
            asked, read = reading(*goals)
            loss, facts = loss + plan["reading"] * asked, facts | read
        return loss, facts

    @torch.no_grad()
    def facts() -> dict[str, float]:
        told = [loss_of(check, 1.0) for check in checks]
        loss, right = (
            sum(values) / len(told) for values in zip(*((t[0].item(), t[1]["answers"]) for t in told))
        )
        names = {name: None for _, found in told for name in found if name != "answers"}
        means = {f"test_{name}": float(np.mean([f[name] for _, f in told if name in f])) for name in names}
        return {"held_out_loss": loss, "held_out_answers": right, **means}

    parameters = {name: p for name, p in model.named_parameters() if "vision_tower" not in name}
    if reading:
        parameters |= dict(reading.named_parameters(prefix="heads"))
    optimise(stage, parameters, make, loss_of, plan, log, facts, **limits)
