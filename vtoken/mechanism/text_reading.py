"""Read a prompt's text for a strategy: embeddings, the LLM's state after them, and others in their place."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..streams import unwrapped
from ..tokens import VisualTokens
from .attention_rows import check_whole, products
from .forward_context import Run
from .transformers_names import hidden_states_of


def check_labels(run: Run, real: Tensor) -> None:
    """Raise ValueError for a row with pictures whose labels leave no prompt; `real` is (B, q) bool."""
    assert run.ends is not None and run.visual is not None
    before = real & (torch.arange(real.shape[1], device=real.device) < run.ends[:, None])
    if bool((run.visual.any(1) & ~before.any(1)).any()):
        raise ValueError(
            "A strategy that reads the text found labels that count from the first token: set the labels of"
            " the prompt to -100, or use one that does not, such as farcover with relevance=0.0."
        )


def first_layers(decoder: Any, count: int) -> Any:
    """A language model of the first layers of another one, with its weights and without its last norm."""
    short = copy.copy(decoder)
    layers, norm = nn.ModuleList(list(decoder.layers)[:count]), nn.Identity()
    short._modules = {**decoder._modules, "layers": layers, "norm": norm}
    return short


@dataclass
class TextReading:
    """Reads the text of prompts for one patch.

    Attributes:
        decoder: the language model.
        question: whether the strategy reads the LLM's state after the text.
        fuse: `fuse(embeddings (n, d), visual (n,) bool) -> (n - v, d)`, embeddings in place of those of the
            text; None if the text stays as it is.
        depth: of the layer whose attention from the text's last token to the visual tokens is read, a share
            of the layers; None if none is.
        noted: `noted(tokens, layers)` hears what the language model has read.
    """

    decoder: Any
    question: bool = False
    fuse: Callable[[Tensor, Tensor], Tensor] | None = None
    depth: float | None = None
    noted: Callable[[int, int], None] = lambda tokens, layers: None

    @property
    def needs_prompt(self) -> bool:
        """Whether weights are trained with the text: labels must leave some of it."""
        return self.question or self.depth is not None or self.fuse is not None

    def told(
        self, items: list[VisualTokens], text: Tensor, tokenwise: dict[str, Tensor], ids: Tensor | None = None
    ) -> list[VisualTokens]:
        """The images or videos of a prompt, with its text (t, d), and its ids (t,), for the strategy."""
        state = self.state(text, tokenwise) if self.question and len(text) else None
        looks = self._looks(text, tokenwise) if self.depth is not None and len(text) else None
        out = []
        for item in items:
            device = item.features.device
            question = None if state is None else state.to(device)
            told = None if ids is None else ids.to(device)
            attention = None if looks is None else looks(item.features).to(device)
            out.append(
                replace(
                    item,
                    text_embeddings=text.to(device),
                    text_ids=told,
                    question=question,
                    question_attention=attention,
                )
            )
        return out

    def _looks(self, text: Tensor, tokenwise: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """How the last token of a text (t, d) looks at visual tokens: from (n, d) to (heads, n) float32."""
        assert self.depth is not None
        layers = self.decoder.layers
        index = min(len(layers) - 1, round(self.depth * len(layers)))
        for which in "qk":  # before layers run whose processes wait for each other
            projection = getattr(layers[index].self_attn, f"{which}_proj", None)
            check_whole(projection, which, "one that does not, such as farcover with relevance=0.0")
        return functools.partial(products, layers[index], self.state(text, tokenwise, index))

    @torch.no_grad()
    def state(self, text: Tensor, tokenwise: dict[str, Tensor], before: int | None = None) -> Tensor:
        """(d,) the language model's output at the last token of a text (t, d) that it reads alone.

        Args:
            text: (t, d).
            tokenwise: the language model's other arguments for these tokens, (t, ...) by name.
            before: read what enters this layer instead of the output.
        """
        self.noted(len(text), len(unwrapped(self.decoder).layers) if before is None else before)
        # `forward` and not a call: hooks on the language model belong to the prompt that is being read
        forward = self.decoder.forward
        if before is not None:
            decoder = unwrapped(self.decoder)  # a compiled one has its forward inside
            forward = functools.partial(type(decoder).forward, first_layers(decoder, before))
        beside = {name: x[None] for name, x in tokenwise.items()}
        return hidden_states_of(forward(inputs_embeds=text[None], use_cache=False, **beside))[0, -1]

    def fused(self, embeddings: Tensor, visual: Tensor) -> Tensor:
        """The strategy's answer for one prompt. Raises ValueError for one of another shape."""
        assert self.fuse is not None
        out, wanted = self.fuse(embeddings, visual), (int((~visual).sum()), embeddings.shape[1])
        if tuple(out.shape) != wanted:
            raise ValueError(
                f"fuse_text must give {wanted}, an embedding per text token, found {tuple(out.shape)}."
            )
        return out
