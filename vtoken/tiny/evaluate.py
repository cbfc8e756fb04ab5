"""Measures a tiny model as its user runs it: real processor, plain ``generate``, exact answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .scenes import KINDS, Question, Scene, held_out, make_scene


def prompt(processor: Any, text: str) -> str:
    """The chat prompt of one question about one image."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.no_grad()
def answers(model: Any, processor: Any, pairs: Sequence[tuple[Scene, Question]], batch_size: int = 50) -> list[str]:
    """Greedy answers to questions about scenes, batched with left padding."""
    said: list[str] = []
    for first in range(0, len(pairs), batch_size):
        some = pairs[first : first + batch_size]
        inputs = processor(
            images=[scene.image for scene, _ in some],
            text=[prompt(processor, question.text) for _, question in some],
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        said += [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]
    return said


def score(pairs: Sequence[tuple[Scene, Question]], said: Sequence[str]) -> dict[str, float]:
    """Share of exact answers for ``all`` and for each kind that occurs."""
    right = [question.answer == text for (_, question), text in zip(pairs, said)]
    table = {"all": sum(right) / max(len(right), 1)}
    for kind in KINDS:
        some = [r for r, (_, question) in zip(right, pairs) if question.kind == kind]
        if some:
            table[kind] = sum(some) / len(some)
    return table


def evaluate(model: Any, processor: Any, n: int = 500, seed: int = 0, batch_size: int = 50) -> dict[str, float]:
    """Exact-match accuracy on ``n`` held-out questions, balanced over the kinds.

    Args:
        model, processor: as `vtoken.tiny.load` returns them.
        n: number of questions, each about a test scene of its own.
        seed: which test scenes.
        batch_size: prompts per ``generate`` call.

    Returns:
        Accuracy in 0..1 for ``all`` and for each of ``shape``, ``colour``, ``where``, ``count``, ``exists``.
    """
    pairs = held_out(n, seed)
    return score(pairs, answers(model, processor, pairs, batch_size))


def most_frequent(n: int = 500, seed: int = 0, train_scenes: int = 500) -> dict[str, float]:
    """What a reader of the question alone would score: each kind's most frequent answer in the training split."""
    from collections import Counter

    from .scenes import questions

    seen: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for i in range(train_scenes):
        for question in questions(make_scene(i)):
            seen[question.kind][question.answer] += 1
    pairs = held_out(n, seed)
    return score(pairs, [seen[question.kind].most_common(1)[0][0] for _, question in pairs])


@torch.no_grad()
def pruned_accuracy(model: Any, processor: Any, share: float, by: str, n: int = 500, seed: int = 0) -> dict[str, float]:
    """Accuracy when only a share of the visual tokens is fed, at their original positions.

    An independent few lines to see whether a freshly trained model is fit for studies of token reduction.

    Args:
        share: share of the visual tokens that stays, in (0, 1].
        by: ``cls`` keeps the tokens with most CLS attention in the layer whose output is read; ``random`` draws them.
    """
    from .tower import cls_rows, hidden_states

    if by not in ("cls", "random"):
        raise ValueError(f"unknown criterion {by!r}: use cls or random")
    inner, device, end = model.model, model.device, model.generation_config.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    pairs = held_out(n, seed)
    said = [""] * n
    texts = [prompt(processor, question.text) for _, question in pairs]
    lengths = [len(ids) for ids in processor.tokenizer(texts).input_ids]
    for length in sorted(set(lengths)):  # prompts of one length make one batch without padding
        some = [i for i, own in enumerate(lengths) if own == length]
        images = [pairs[i][0].image for i in some]
        inputs = processor(images=images, text=[texts[i] for i in some], return_tensors="pt").to(device)
        states = hidden_states(inner.vision_tower, inputs["pixel_values"])
        features = inner.multi_modal_projector(states[-2][:, 1:])
        rank = torch.rand(features.shape[:2], generator=generator)
        if by == "cls":
            rank = cls_rows(inner.vision_tower, states, len(states) - 3).mean(1)
        keep = rank.to(device).topk(max(1, round(share * features.shape[1]))).indices
        ids = inputs["input_ids"]
        visual = ids == model.config.image_token_id
        embeds = model.get_input_embeddings()(ids).masked_scatter(visual[..., None], features)
        stays = ~visual
        stays[visual] = torch.zeros_like(rank, dtype=torch.bool, device=device).scatter_(1, keep, True).flatten()
        hidden = embeds[stays].view(len(some), -1, embeds.shape[-1])
        position = torch.arange(ids.shape[1], device=device).expand_as(ids)[stays].view(len(some), -1)
        cache, words = None, []
        for _ in range(4):
            out = inner.language_model(
                inputs_embeds=hidden, position_ids=position, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            words.append(model.lm_head(out.last_hidden_state[:, -1]).argmax(-1))
            hidden, position = model.get_input_embeddings()(words[-1])[:, None], position[:, -1:] + 1
        for i, row in zip(some, torch.stack(words, 1).tolist()):
            row = row[: row.index(end)] if end in row else row
            said[i] = processor.decode(row, skip_special_tokens=True).strip()
    return score(pairs, said)
