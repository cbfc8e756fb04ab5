"""Figures of the model cards: accuracy from the question alone, and with few visual tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from vtoken.tiny.questions import Pairs, held_out, prepare, prompt, score
from vtoken.tiny.scenes import Question


def most_frequent(pairs: Pairs, seen: Iterable[Question]) -> dict[str, float]:
    """Accuracy from the question alone: each kind's most frequent answer among the ``seen`` questions."""
    counts: dict[str, Counter[str]] = {}
    for question in seen:
        counts.setdefault(question.kind, Counter())[question.answer] += 1
    return score(pairs, [counts[question.kind].most_common(1)[0][0] for _, question in pairs])


@torch.no_grad()
def pruned_accuracy(
    model: Any, processor: Any, share: float, by: str, n: int = 500, seed: int = 0, name: str = "llava"
) -> dict[str, float]:
    """Accuracy of a LLaVA that reads only a share of the visual tokens, at their original positions.

    An independent few lines to see whether a freshly trained model is fit for studies of token reduction.

    Args:
        share: share of the visual tokens that stays, in (0, 1].
        by: ``cls`` keeps the tokens with most CLS attention in the layer whose output is read; ``random``
            draws them.
        name: tiny model with the held-out questions.
    """
    from vtoken.mechanism.transformers_names import cache_argument, cache_in

    from .tower import cls_rows, hidden_states

    if by not in ("cls", "random"):
        raise ValueError(f"unknown criterion {by!r}: use cls or random")
    inner, device, end = model.model, model.device, model.generation_config.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    pairs = held_out(name, n, seed)
    said = [""] * n
    texts = [prompt(processor, question.text) for _, question in pairs]
    lengths = [len(ids) for ids in processor.tokenizer(texts).input_ids]
    for length in sorted(set(lengths)):  # prompts of one length make one batch without padding
        some = [i for i, own in enumerate(lengths) if own == length]
        inputs = prepare(processor, [pairs[i] for i in some]).to(device)
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
        stays[visual] = (
            torch.zeros_like(rank, dtype=torch.bool, device=device).scatter_(1, keep, True).flatten()
        )
        hidden = embeds[stays].view(len(some), -1, embeds.shape[-1])
        position = torch.arange(ids.shape[1], device=device).expand_as(ids)[stays].view(len(some), -1)
        cached: dict[str, Any] = {}
        words = []
        for _ in range(4):
            out = inner.language_model(inputs_embeds=hidden, position_ids=position, use_cache=True, **cached)
            cached = {cache_argument(inner.language_model.forward): cache_in(out)}
            words.append(model.lm_head(out.last_hidden_state[:, -1]).argmax(-1))
            hidden, position = model.get_input_embeddings()(words[-1])[:, None], position[:, -1:] + 1
        for i, row in zip(some, torch.stack(words, 1).tolist()):
            row = row[: row.index(end)] if end in row else row
            said[i] = processor.decode(row, skip_special_tokens=True).strip()
    return score(pairs, said)
