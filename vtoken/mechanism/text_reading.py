"""Read a prompt's text for a strategy: embeddings, the LLM's state after them, and others in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..tokens import VisualTokens
from .forward_context import Run
from .transformers_names import hidden_states_of


def check_labels(run: Run, real: Tensor) -> None:
    """Raise ValueError for a row with pictures whose labels leave no prompt; `real` is (B, q) bool."""
    assert run.ends is not None and run.visual is not None
    before = real & (torch.arange(real.shape[1], device=real.device) < run.ends[:, None])
    if bool((run.visual.any(1) & ~before.any(1)).any()):
        raise ValueError(
            "A strategy that reads the text found labels that count from the first token: set the labels of"
            " the prompt to -100."
        )


@dataclass
class TextReading:
    """Reads the text of prompts for one patch.

    Attributes:
        decoder: the language model.
        question: whether the strategy reads the LLM's state after the text.
        fuse: `fuse(embeddings (n, d), visual (n,) bool) -> (n - v, d)`, embeddings in place of those of the
            text; None if the text stays as it is.
    """

    decoder: Any
    question: bool = False
    fuse: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def needs_prompt(self) -> bool:
        """Whether weights are trained with the text: labels must leave some of it."""
        return self.question or self.fuse is not None

    def told(
        self, items: list[VisualTokens], text: Tensor, tokenwise: dict[str, Tensor], ids: Tensor | None = None
    ) -> list[VisualTokens]:
        """The images or videos of a prompt, with its text (t, d), and its ids (t,), for the strategy."""
        state = self.state(text, tokenwise) if self.question and len(text) else None
        out = []
        for item in items:
            device = item.features.device
            question = None if state is None else state.to(device)
            told = None if ids is None else ids.to(device)
            out.append(replace(item, text_embeddings=text.to(device), text_ids=told, question=question))
        return out

    @torch.no_grad()
    def state(self, text: Tensor, tokenwise: dict[str, Tensor]) -> Tensor:
        """(d,) the language model's output at the last token of a text (t, d) that it reads alone.

        Args:
            text: (t, d).
            tokenwise: the language model's other arguments for these tokens, (t, ...) by name.
        """
        # `forward` and not a call: hooks on the language model belong to the prompt that is being read
        beside = {name: x[None] for name, x in tokenwise.items()}
        out = self.decoder.forward(inputs_embeds=text[None], use_cache=False, **beside)
        return hidden_states_of(out)[0, -1]

    def fused(self, embeddings: Tensor, visual: Tensor) -> Tensor:
        """The strategy's answer for one prompt. Raises ValueError for one of another shape."""
        assert self.fuse is not None
        out, wanted = self.fuse(embeddings, visual), (int((~visual).sum()), embeddings.shape[1])
        if tuple(out.shape) != wanted:
            raise ValueError(
                f"fuse_text must give {wanted}, an embedding per text token, found {tuple(out.shape)}."
            )
        return out
