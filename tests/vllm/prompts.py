"""Prompts of every kind with their answers by transformers under vtoken.patch, and the same prompts for vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import vtoken
from vtoken.tiny import clips, scenes

NEW = 6  # tokens of an answer


@dataclass
class Case:
    """A prompt, its pictures, and what transformers answers.

    Attributes:
        tokens: those of the answer. sure: their log-probabilities.
        kept: per picture the indices of the kept tokens.
        length: tokens of the prompt, dropped ones left out.
        logprobs: (vocabulary,) of the first token of the answer.
    """

    kind: str
    prompt: str
    images: list[Any] = field(default_factory=list)
    clips: list[Any] = field(default_factory=list)
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    sure: list[float] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    length: int = 0
    logprobs: Any = None


def cases(
    processor: Any, shapes: int = 10, videos: int = 4, stretch: Sequence[int] | None = None
) -> list[Case]:
    """One image, two images, a clip, two clips, an image and a clip, and text alone.

    Args:
        shapes: scenes, each with up to 4 questions. videos: clips; 0 for models that read none.
        stretch: width and height in px of the images; their own if None.
    """

    def chat(kinds: list[str], text: str) -> str:
        content = [{"type": k} for k in kinds] + [{"type": "text", "text": text}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    shown = [scenes.make_scene(500 + i, "test") for i in range(shapes)]
    pictures = [s.image if stretch is None else s.image.resize(tuple(stretch)) for s in shown]
    out = [
        Case("image", chat(["image"], question.text), [picture])
        for scene, picture in zip(shown, pictures)
        for question in scenes.questions(scene)[:4]
    ]
    for i in range(min(4, shapes - 1)):
        question = scenes.questions(shown[i])[1].text
        out.append(Case("two images", chat(["image"] * 2, question), pictures[i : i + 2]))
    films = [clips.make_clip(700 + i, "test", frames=8).media for i in range(videos)]
    for i, film in enumerate(films):
        other = films[(i + 1) % len(films)]
        out.append(Case("clip", chat(["video"], "which digit came first? " * 6), [], [film]))
        out.append(Case("two clips", chat(["video"] * 2, "which digit came first?"), [], [film, other]))
        asked = chat(["image", "video"], "how many digits were shown?")
        out.append(Case("image and clip", asked, [pictures[i % shapes]], [film]))
    out += [Case("text", chat([], text)) for text in ("how many objects are there?", "is there a red star?")]
    return out


def facts(film: Any) -> dict[str, Any]:
    """Metadata of a clip, as processors take them."""
    step = film.seconds[1] - film.seconds[0] if len(film) > 1 else 1.0
    return {"total_num_frames": len(film), "fps": 1 / step, "frames_indices": list(range(len(film)))}


def pixels(film: Any) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in film])


@torch.no_grad()
def answer(model: Any, processor: Any, case: Case, patched: bool = True, **settings: Any) -> Case:
    """The case with what transformers says, and, of a patched model, the kept tokens of its report.

    Args:
        settings: further ones of `generate`; they replace those that are written here.
    """
    given: dict[str, Any] = {"images": case.images} if case.images else {}
    if case.clips:
        told = [facts(film) for film in case.clips]
        given |= {
            "videos": [pixels(f) for f in case.clips],
            "video_metadata": told,
            "do_sample_frames": False,
        }
    inputs = processor(text=[case.prompt], return_tensors="pt", **given)
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    out = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **settings)
    case.length = inputs["input_ids"].shape[1]
    new = out.sequences[0, case.length :]
    case.tokens = new.tolist()
    case.text = processor.decode(new, skip_special_tokens=True).strip()
    steps = torch.cat(out.logits).float().log_softmax(-1)
    case.logprobs = steps[0]
    case.sure = steps.gather(1, new[:, None])[:, 0].tolist()
    if patched and (case.images or case.clips):
        visuals = vtoken.report(model).visuals
        case.kept = [v.keep.tolist() for v in visuals]
        case.length -= sum(v.tokens_in - v.tokens_out for v in visuals)
    return case


def request(case: Case, budget: float | int | None = None) -> dict[str, Any]:
    """The case as vLLM's `LLM.generate` takes it."""
    about = [facts(f) | {"video_backend": "opencv", "do_sample_frames": False} for f in case.clips]
    media = {"image": case.images, "video": [(pixels(f), a) for f, a in zip(case.clips, about)]}
    asked: dict[str, Any] = {"prompt": case.prompt, "multi_modal_data": {k: v for k, v in media.items() if v}}
    return asked if budget is None else asked | {"mm_processor_kwargs": {"vtoken_budget": budget}}
