"""Held-out questions for each tiny model, and its answers by its real processor and plain ``generate``.

An example is an object with ``.media``: a PIL image, or a list of PIL frames whose times are in ``.seconds``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from . import clips, clutter, long_clips, pages, scenes
from .scenes import Question
from .scenes_wide import LARGE, held_out_wide

Pairs = Sequence[tuple[Any, Question]]
LENGTHS = (4, 6, 8)  # frames of held-out clips: up to two, three and four moments


def _in_turn(
    images: Callable[[int, int], list[tuple[Any, Question]]], n: int, seed: int
) -> list[tuple[Any, Question]]:
    """Interleave: an image, a clip, an image, ..."""
    pictures, videos = images(n - n // 2, seed), clips.held_out(n // 2, seed, LENGTHS)
    return [pair for both in zip(pictures, videos) for pair in both] + pictures[n // 2 :]


HELD_OUT: dict[str, Callable[[int, int], list[tuple[Any, Question]]]] = {
    "llava": scenes.held_out,
    "llava_next": held_out_wide,
    "llava_pages": pages.held_out,
    "llava_onevision": partial(_in_turn, partial(held_out_wide, layout=LARGE)),
    "qwen2_5_vl": partial(_in_turn, scenes.held_out),
    "llava_clutter": clutter.held_out,
    "qwen2_5_vl_long": long_clips.held_out,
}


# tiny models whose questions tell good strategies from better ones
HARDER = ("llava_clutter", "llava_pages", "qwen2_5_vl_long")


def held_out(name: str, n: int, seed: int = 0) -> list[tuple[Any, Question]]:
    """``n`` questions about the test split of the tiny model ``name``: (example, question) pairs.

    ``seed`` picks a disjoint set of examples. For models of images and video they are in turn about an image
    and a clip.

    Raises:
        ValueError: there is no tiny model of that name.
    """
    if name not in HELD_OUT:
        raise ValueError(f"unknown tiny model {name!r}: the models are {', '.join(HELD_OUT)}")
    return HELD_OUT[name](n, seed)


def prompt(processor: Any, text: str, media: str = "image") -> str:
    """The chat prompt of one question about one ``image`` or one ``video``."""
    content = [{"type": media}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def prepare(processor: Any, pairs: Pairs) -> Any:
    """Inputs for questions about images, or about videos of one number of frames; padded on the left.

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
    model: Any,
    processor: Any,
    pairs: Pairs,
    batch_size: int = 50,
    change: Callable[[Any], None] = lambda inputs: None,
) -> list[str]:
    """Greedy answers in batches padded on the left: images with images, clips with equally long clips.

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
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[
                :, inputs["input_ids"].shape[1] :
            ]
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
        name: tiny model with the held-out questions.

    Returns:
        Accuracy in 0..1 for ``all`` and for each kind of question.
    """
    pairs = held_out(name, n, seed)
    return score(pairs, answers(model, processor, pairs, batch_size))
