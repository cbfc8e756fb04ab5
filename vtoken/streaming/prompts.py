"""Prompts about the steps of a stream, made by the model's own processor."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .frames import Frames
from .memory import Step

GAP = 16  # largest number of steps that a gap between remembered frames counts in multimodal rope


@dataclass
class PromptInputs:
    """A prompt about some steps, ready for `generate`.

    Attributes:
        arguments: arguments of `generate` on the model's device: `input_ids` (1, n), masks, `position_ids`,
            and the features.
        visual: (n,) bool, the visual tokens.
        seconds: times of the prompt's frames.
    """

    arguments: dict[str, Any]
    visual: Tensor
    seconds: tuple[float, ...]

    @property
    def length(self) -> int:
        return int(self.arguments["input_ids"].shape[1])


class Prompts:
    """Writes prompts.

    Args:
        frames: the processor.
        prompt: custom text with "{frames}" and "{question}"; None uses the processor's chat template.
        system: system message for the chat template.
        fps: frames per second, None to take the median distance between frames.

    Raises:
        ValueError: if the processor has no chat template and no prompt was given.
    """

    def __init__(self, frames: Frames, prompt: str | None, system: str | None, fps: float | None) -> None:
        self.frames, self.prompt, self.system, self.fps = frames, prompt, system, fps
        if prompt is None and getattr(frames.processor, "chat_template", None) is None:
            raise ValueError(
                f'This {type(frames.processor).__name__} has no chat template: pass prompt="... {{frames}}'
                ' ... {question} ...", the text of a prompt.'
            )

    def text(self, question: str, steps: int) -> str:
        """The prompt as text, before the placeholders are expanded."""
        if self.prompt is not None:
            return self.prompt.replace("{frames}", self.frames.marks(steps)).replace("{question}", question)
        count = steps if self.frames.media == "image" else 1
        content = [{"type": self.frames.media}] * count + [{"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        return self.frames.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def inputs(self, question: str, steps: Sequence[Step], renumber: bool = False) -> PromptInputs:
        """The processor's prompt about remembered steps, without the placeholders of dropped tokens.

        Positions are those of the whole prompt; `renumber` closes their gaps if they count tokens. In
        multimodal rope without time stamps in the text, a gap between steps counts as the frames that would
        fill it, `GAP` at most.
        """
        self.check(question)
        fps = self.fps or _usual_fps(steps)
        places = self._times(steps, fps)
        times = [
            t for s in steps for t in (*s.seconds, *[s.seconds[-1]] * (self.frames.unit - len(s.seconds)))
        ]
        full = self.frames.replay(self.text(question, len(steps)), places[-1] + 1, times, fps)
        visual = self.frames.placeholders(full)
        columns = visual.nonzero()[:, 0]
        if len(columns) != (places[-1] + 1) * self.frames.rows + self.frames.tail:
            raise RuntimeError(
                f"The prompt of {places[-1] + 1} steps has {len(columns)} visual placeholders, expected"
                f" {(places[-1] + 1) * self.frames.rows + self.frames.tail}: a prompt of one's own has"
                " {frames} once."
            )
        keep = ~visual
        for place, step in zip(places, steps, strict=True):
            keep[columns[place * self.frames.rows + step.kept]] = True
        tail = steps[-1].tail
        if tail is not None and len(tail) == self.frames.tail:
            keep[columns[len(columns) - self.frames.tail :]] = True
        device, length = self.frames.adapter.model.device, visual.shape[0]
        arguments: dict[str, Any] = {
            k: v[:, keep].to(device)
            for k, v in full.items()
            if isinstance(v, Tensor) and v.shape == (1, length)
        }
        arguments["position_ids"] = self._positions(full, keep, renumber).to(device)
        arguments["mm_encoder_outputs"] = {self.frames.modality: self.frames.features_of(steps)}
        return PromptInputs(arguments, visual[keep], tuple(t for s in steps for t in s.seconds))

    def around(self, question: str) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of a prompt before the frames and after them, and those of a video's end; (n,) int64 each.

        Raises:
            ValueError: if the processor writes text between frames.
        """
        self.check(question)
        full = self.frames.replay(self.text(question, 2), 2, [], 1.0)
        ids, places = full["input_ids"][0], self.frames.placeholders(full).nonzero()[:, 0]
        first, last = int(places[0]), int(places[-1])
        if last - first + 1 != len(places):
            name = type(self.frames.processor).__name__
            raise ValueError(
                f"memory='rekv' needs frames without text between them, and {name} writes some: use"
                " memory='recent'."
            )
        return ids[:first], ids[last + 1 :], ids[last + 1 - self.frames.tail : last + 1]

    def ids_of(self, question: str) -> Tensor:
        """(n,) int64, ids of the question alone."""
        with self.frames.lock:
            tokenizer = getattr(self.frames.processor, "tokenizer", self.frames.processor)
            return tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"][0]

    def check(self, question: Any) -> None:
        """Raise TypeError if the question is no text; ValueError if it is empty or holds a placeholder."""
        if not isinstance(question, str):
            raise TypeError(f"A question is a text, found {type(question).__name__}.")
        if not question.strip():
            raise ValueError("The question is empty: ask something.")
        if self.frames.token in question:
            raise ValueError(
                f"The question must not contain {self.frames.token}, which stands for frames in this model's"
                " prompts."
            )

    def _times(self, steps: Sequence[Step], fps: float) -> list[int]:
        """The place of every step among the steps of the prompt's video."""
        if not self.frames.timed:
            return list(range(len(steps)))
        places = [0]
        for a, b in itertools.pairwise(steps):
            gap = round((b.seconds[0] - a.seconds[0]) * fps / self.frames.unit)
            places.append(places[-1] + min(max(gap, 1), GAP))
        return places

    def _positions(self, full: Any, keep: Tensor, renumber: bool) -> Tensor:
        base = self.frames.adapter.base
        if hasattr(base, "get_rope_index"):
            names = inspect.signature(base.get_rope_index).parameters
            rope = base.get_rope_index(**{k: v for k, v in full.items() if k in names})[0][..., keep]
            return torch.cat([torch.arange(rope.shape[-1]).expand(1, 1, -1).to(rope), rope])
        return (torch.arange(int(keep.sum())) if renumber else keep.nonzero()[:, 0])[None]


def _usual_fps(steps: Sequence[Step]) -> float:
    """Frames per second by the median distance between frames of a step, or else between steps."""
    seconds = [s.seconds for s in steps]
    gaps = [b - a for s in seconds for a, b in itertools.pairwise(s)] or [
        b[0] - a[0] for a, b in itertools.pairwise(seconds)
    ]
    return 1.0 / float(np.median(gaps)) if gaps else 1.0
