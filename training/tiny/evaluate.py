"""Measures a tiny model as its user runs it: real processor, plain ``generate``, exact answers.

An example is anything with ``.media``: a PIL image, or a list of PIL frames whose times are in ``.seconds``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from vtoken.tiny.scenes import Question

from .recipes import recipe

Pairs = Sequence[tuple[Any, Question]]


def held_out(name: str, n: int, seed: int = 0) -> list[tuple[Any, Question]]:
    """``n`` (example, question) pairs that the recipe ``name`` holds out; ``seed`` picks a disjoint set of examples."""
    return recipe(name).held_out(n, seed)


def prompt(processor: Any, text: str, media: str = "image") -> str:
    """The chat prompt of one question about one ``image`` or one ``video``."""
    content = [{"type": media}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def prepare(processor: Any, pairs: Pairs) -> Any:
    """The model's inputs for questions about images, or about videos of one number of frames; padded on the left.

    All frames are given to the model: none is left out by the video processor.
    """
    media = [example.media for example, _ in pairs]
    kind = "video" if isinstance(media[0], list) else "image"
    kwargs: dict[str, Any] = {"images": media}
    if kind == "video":
        clips = [np.stack([np.asarray(frame) for frame in frames]) for frames in media]
        facts = [_metadata(example.seconds) for example, _ in pairs]
        kwargs = {"videos": clips, "video_metadata": facts, "do_sample_frames": False}
    texts = [prompt(processor, question.text, kind) for _, question in pairs]
    return processor(text=texts, padding=True, return_tensors="pt", **kwargs)


def _metadata(seconds: Sequence[float]) -> dict[str, Any]:
    n = len(seconds)
    fps = (n - 1) / (seconds[-1] - seconds[0]) if n > 1 else 1.0
    return {"fps": fps, "total_num_frames": n, "duration": n / fps, "frames_indices": list(range(n))}


@torch.no_grad()
def answers(
    model: Any, processor: Any, pairs: Pairs, batch_size: int = 50, change: Callable[[Any], None] = lambda inputs: None
) -> list[str]:
    """Greedy answers to questions about examples, batched with left padding: images with images, clips with as long.

    ``change`` is given the inputs of each batch and may change them.
    """
    said = [""] * len(pairs)
    groups: dict[int, list[int]] = {}
    for i, (example, _) in enumerate(pairs):
        groups.setdefault(len(example.media) if isinstance(example.media, list) else 0, []).append(i)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            some = group[first : first + batch_size]
            inputs = prepare(processor, [pairs[i] for i in some]).to(model.device)
            change(inputs)
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(some, processor.batch_decode(out, skip_special_tokens=True)):
                said[i] = text.strip()
    return said


def score(pairs: Pairs, said: Sequence[str]) -> dict[str, float]:
    """Share of exact answers for ``all`` and for each kind that occurs."""
    right = [question.answer == text for (_, question), text in zip(pairs, said)]
    table = {"all": sum(right) / max(len(right), 1)}
    for kind in dict.fromkeys(question.kind for _, question in pairs):
        some = [r for r, (_, question) in zip(right, pairs) if question.kind == kind]
        table[kind] = sum(some) / len(some)
    return table


def evaluate(
    model: Any, processor: Any, n: int = 500, seed: int = 0, batch_size: int = 50, name: str = "llava"
) -> dict[str, float]:
    """Exact-match accuracy on ``n`` held-out questions, balanced over the kinds.

    Args:
        model, processor: as `vtoken.tiny.load` returns them.
        n: number of questions, each about a test example of its own.
        seed: which test examples.
        batch_size: prompts per ``generate`` call.
        name: whose held-out questions.

    Returns:
        Accuracy in 0..1 for ``all`` and for each kind of question.
    """
    pairs = held_out(name, n, seed)
    return score(pairs, answers(model, processor, pairs, batch_size))


def most_frequent(pairs: Pairs, seen: Iterable[Question]) -> dict[str, float]:
    """What a reader of the question alone would score: each kind's most frequent answer among the questions ``seen``."""
    counts: dict[str, Counter[str]] = {}
    for question in seen:
        counts.setdefault(question.kind, Counter())[question.answer] += 1
    return score(pairs, [counts[question.kind].most_common(1)[0][0] for _, question in pairs])


@torch.no_grad()
def pruned_accuracy(model: Any, processor: Any, share: float, by: str, n: int = 500, seed: int = 0) -> dict[str, float]:
    """Accuracy of a LLaVA when only a share of the visual tokens is fed, at their original positions.

    An independent few lines to see whether a freshly trained model is fit for studies of token reduction.

    Args:
        share: share of the visual tokens that stays, in (0, 1].
        by: ``cls`` keeps the tokens with most CLS attention in the layer whose output is read; ``random`` draws them.
    """
    from vtoken.mechanism.transformers_names import cache_argument, cache_in

    from .tower import cls_rows, hidden_states

    if by not in ("cls", "random"):
        raise ValueError(f"unknown criterion {by!r}: use cls or random")
    inner, device, end = model.model, model.device, model.generation_config.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    pairs = held_out("llava", n, seed)
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
        stays[visual] = torch.zeros_like(rank, dtype=torch.bool, device=device).scatter_(1, keep, True).flatten()
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
