"""Batches of conversations: the inputs of a model, and labels for the answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images import open_image
from .conversations import Conversation

IGNORED = -100  # the label of a token without loss


class Collator:
    """Makes batches of conversations with a model's own processor.

    Args:
        processor: with a chat template.
        frames: of a video that are read, evenly spread.

    Raises:
        ValueError: for a processor without a chat template, or one that reads no videos if there are some.
    """

    def __init__(self, processor: Any, frames: int = 8) -> None:
        if not getattr(processor, "chat_template", None):
            raise ValueError(f"{type(processor).__name__} has no chat template, which makes the prompts.")
        self.processor, self.frames = processor, frames

    def __call__(self, batch: Sequence[Conversation]) -> dict[str, Any]:
        """Inputs of `model.forward` with labels; rows are padded on the right."""
        texts, spans = zip(*(self._rendered(c) for c in batch), strict=True)
        given = self._media(batch)
        begin = getattr(self.processor.tokenizer, "bos_token", None)
        special = not (begin and texts[0].startswith(begin))
        made = self.processor(
            text=list(texts),
            **given,
            padding=True,
            padding_side="right",
            add_special_tokens=special,
            return_tensors="pt",
        )
        ids, mask = made["input_ids"], made["attention_mask"].bool()
        labels = torch.full_like(ids, IGNORED)
        for row, (text, answers) in enumerate(zip(texts, spans, strict=True)):
            self._label(labels[row], ids[row], int(mask[row].sum()), text, answers, special)
        return dict(made) | {"labels": labels}

    def _rendered(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the first and one past the last character of every answer."""
        messages, spans = conversation.messages(), []
        for i in range(1, len(messages), 2):
            asked = self.processor.apply_chat_template(messages[:i], add_generation_prompt=True)
            answered = self.processor.apply_chat_template(messages[: i + 1])
            if not answered.startswith(asked):
                raise ValueError(
                    "The chat template renders a question otherwise once it is answered, so that the answer"
                    " cannot be told from it: use conversations with one answer and another template."
                )
            spans.append((len(asked), len(asked) + len(answered[len(asked) :].rstrip())))
        return answered, spans

    def _label(
        self,
        labels: Tensor,
        ids: Tensor,
        length: int,
        text: str,
        answers: list[tuple[int, int]],
        special: bool,
    ) -> None:
        """Write the labels of one row. Pictures become more tokens than the text says, all before answers."""
        tokens = self.processor.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        added = length - len(tokens["input_ids"])
        for place, (first, last) in enumerate(tokens["offset_mapping"]):
            if any(first < end and last > start for start, end in answers):
                labels[place + added] = ids[place + added]

    def _media(self, batch: Sequence[Conversation]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if any(c.images for c in batch):
            given["images"] = [[open_image(path) for path in c.images] for c in batch if c.images]
        films = [self._frames(path) for c in batch for path in c.videos]
        if films:
            if getattr(self.processor, "video_processor", None) is None:
                raise ValueError(f"{type(self.processor).__name__} reads no videos, which this batch has.")
            pixels, facts = zip(*films, strict=True)
            given |= {"videos": list(pixels), "video_metadata": list(facts), "do_sample_frames": False}
        return given

    def _frames(self, path: Path) -> tuple[np.ndarray, dict[str, Any]]:
        """Frames (n, height, width, 3) of a video, and the facts that processors ask for."""
        from ..video import open_video, sample_uniform

        with open_video(path) as reader:
            frames = sample_uniform(reader, self.frames)
            total = len(reader)  # type: ignore[arg-type]
            facts = {"total_num_frames": total, "fps": reader.fps, "duration": total / reader.fps}
        return np.stack([f.image for f in frames]), facts | {"frames_indices": [f.index for f in frames]}
