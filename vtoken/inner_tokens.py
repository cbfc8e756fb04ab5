"""What a strategy sees inside the vision tower (`EncoderTokens`) and inside the LLM (`PrefillTokens`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class EncoderTokens:
    """All segments of one forward of a vision tower, behind one of its layers, prefix tokens (CLS) left out.

    Attributes:
        layer: the tower layer that has just run.
        hidden_states: (segments, n, C).
        grid: (rows, columns) of the patches before anything was merged.
        sizes: (segments, n) float32, patches that each token stands for; ones before the first merge.
    """

    layer: int
    hidden_states: Tensor
    grid: tuple[int, int]
    sizes: Tensor


@dataclass
class EncoderMerge:
    """What becomes of the tokens inside a vision tower; every segment keeps the same number m, as the tower needs.

    Attributes:
        keep: (segments, m) int64, ascending: the places that stay, those of merged tokens included.
        into: (segments, n) int64, the place (0 .. m - 1) that every token ends up in.
        weight: (segments, n) float32, the share with which it is added there.
    """

    keep: Tensor
    into: Tensor
    weight: Tensor


@dataclass
class PrefillTokens:
    """One prompt as LLM layer `layer` receives it, padding removed.

    Attributes:
        layer: the layer in front of which the choice is made.
        hidden_states: (n, d) of all tokens, text included; the embeddings if `layer` is 0.
        visual: (n,) bool.
        positions: (n,) int64, index of each token within the prompt's forward, padding included.
        total_visual: visual tokens of this prompt before anything was dropped.
        attention_rows: `attention_rows(rows)` with (r,) int64 indices into the n tokens -> (heads, r, n) float32, the
            softmaxed rows of the layer before.
        preview_rows: the same of layer `layer` itself, as it would attend if nothing were dropped in front of it.
        end: tokens that belong to the prompt; those behind are drafts (assisted decoding) or generated already (no cache).
        num_layers: layers of the LLM.
        units: images and video frames of this prompt, for budgets in tokens per image or frame.
        item: (n,) int64, which image or video of the prompt a token belongs to, -1 for text.
        separator: (n,) bool, visual tokens that are no patch (image-newline, separator).
        marked: (n,) bool, tokens that the projector stage marked (`Selection.marked`).
        rotary: cosines and sines (n, head_dim) of the tokens' positions in the layer before; None in front of layer 0.
        memory: shared by all layers' choices for this prompt within one forward, empty at the first.
    """

    layer: int
    hidden_states: Tensor
    visual: Tensor
    positions: Tensor
    total_visual: int
    attention_rows: Callable[[Tensor], Tensor]
    preview_rows: Callable[[Tensor], Tensor] | None = None
    end: int = -1
    num_layers: int = 0
    units: int = 1
    item: Tensor | None = None
    separator: Tensor | None = None
    marked: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def visual_rows(self) -> Tensor:
        """(v,) int64, the visual tokens among the n."""
        return self.visual.nonzero()[:, 0]

    @property
    def last_row(self) -> Tensor:
        """(1,) int64, the last token of the prompt."""
        return torch.tensor([(self.end if self.end > 0 else len(self)) - 1], device=self.visual.device)

    @property
    def text_rows(self) -> Tensor:
        """(t,) int64, the prompt's text tokens behind its first visual token; the last token if there are none."""
        text = ~self.visual & (self.visual.cumsum(0) > 0)
        if self.end > 0:
            text[self.end :] = False
        rows = text.nonzero()[:, 0]
        return rows if len(rows) else self.last_row

    def __len__(self) -> int:
        return self.visual.shape[0]
