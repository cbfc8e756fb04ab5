"""Asks a model through its own processor, and measures tokens and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..benchmarks.task import Prompt


@dataclass(frozen=True)
class Reply:
    """Answer of a model to one prompt, and its share of the batch's cost.

    Attributes:
        text: the greedy answer.
        tokens: visual tokens, averaged over the LLM's layers, as `vtoken.report` measured them.
        tokens_in: visual tokens that the unpatched model reads.
        flops, flops_dense: LLM prefill FLOPs of this call and of the unpatched model.
        ttft: seconds from the call of `generate` to the first token of the batch; tower, projector and
            prefill.
        seconds: of the whole `generate`, divided by the prompts of the batch.
    """

    text: str
    tokens: float
    tokens_in: float
    flops: float
    flops_dense: float
    ttft: float
    seconds: float


class FirstToken:
    """A stopping criterion that never stops, and records the time of the first token."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.seconds is None:
            if input_ids.is_cuda:
                torch.cuda.synchronize(input_ids.device)
            self.seconds = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Asker:
    """A model and its processor.

    Clips go through the processor's own video path if the family has one, else as several images of one
    prompt.

    Args:
        model: a transformers model that `vtoken.patch` takes; it is unpatched again after each use.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.reads_video = getattr(processor, "video_processor", None) is not None

    def applied(self, strategy: str | None, budget: float | int = 1.0) -> AbstractContextManager[Any]:
        """Patch for a `with` block; None keeps every token, which is the unpatched model bit for bit."""
        import vtoken

        return vtoken.applied(self.model, strategy or "uniform", budget=budget if strategy else 1.0)

    def refusal(self, strategy: str | None, budget: float | int, prompt: Prompt) -> str:
        """The sentence with which a strategy refuses this model, budget or prompt; empty if it does not.

        It asks the prompt for one token, which is also the warm-up before times are taken.
        """
        try:
            with self.applied(strategy, budget):
                self([prompt], 1)
        except ValueError as error:
            return str(error)
        return ""

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Reply]:
        """Greedy answers to a batch of prompts, under the applied patch."""
        import vtoken

        inputs = self.inputs(prompts)
        first = FirstToken()
        start = time.perf_counter()
        out = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            stopping_criteria=[first],
        )
        said = out[:, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
        end = time.perf_counter()
        report, n = vtoken.report(self.model), len(prompts)
        shared = (
            report.average_visual_tokens,
            report.tokens_in / n,
            report.flops / n,
            report.flops_dense / n,
            (first.seconds or end) - start,
            (end - start) / n,
        )
        texts = self.processor.batch_decode(said, skip_special_tokens=True)
        return [Reply(text.strip(), *shared) for text in texts]

    def inputs(self, prompts: Sequence[Prompt]) -> Any:
        """Inputs of `generate` for a batch of prompts, padded on the left, on the model's device."""
        images, videos, metadata, texts = [], [], [], []
        for prompt in prompts:
            shown: list[Any] = [prompt.image] if prompt.image is not None else []
            if prompt.clip is not None and self.reads_video:
                videos.append(np.stack([np.asarray(frame) for frame in prompt.clip.frames]))
                metadata.append(self.metadata(prompt))
                texts.append(self.chat(prompt.text, "video", 1))
                continue
            shown += prompt.clip.frames if prompt.clip is not None else []
            images.append(shown)
            texts.append(self.chat(prompt.text, "image", len(shown)))
        media: dict[str, Any] = {"images": images} if images else {}
        if videos:
            media |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        begin = getattr(self.processor.tokenizer, "bos_token", None)
        made = self.processor(
            text=texts,
            **media,
            padding=True,
            padding_side="left",
            add_special_tokens=not (begin and texts[0].startswith(begin)),
            return_tensors="pt",
        ).to(self.model.device)
        for key in [k for k in made if k.startswith("pixel_values")]:
            made[key] = made[key].to(self.model.dtype)
        return made

    @staticmethod
    def metadata(prompt: Prompt) -> dict[str, Any]:
        clip = prompt.clip
        width, height = clip.frames[0].size
        return {
            "total_num_frames": clip.total,
            "fps": clip.fps,
            "duration": clip.total / clip.fps,
            "width": width,
            "height": height,
            "frames_indices": clip.indices,
        }

    def chat(self, text: str, kind: str, n: int) -> str:
        """The chat prompt of n images or videos, then a question; LLaVA's wording without a template."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": kind}] * n + [{"type": "text", "text": text}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        return (
            f"USER: {n * (getattr(self.processor, f'{kind}_token', f'<{kind}>') + chr(10))}{text} ASSISTANT:"
        )


def load(model_id: str | None) -> Asker:
    """An `Asker` of a model from the Hub or a folder, or of a tiny one (None: llava).

    Raises as `vtoken.asking.load`.
    """
    from ...asking import load as load_any

    return Asker(*load_any(model_id))
