"""MMTok: the tokens that cover the words of the question and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import greedy_cover
from ..selection import Selection
from ..tokens import Needs, Segment, TowerInfo, VisualTokens
from .base import Strategy
from .common.grouping import cosines, local_cells, rows_per_segment
from .common.tower_features import Vision, vision_features, vision_needs
from .registry import register

COLDEST = 1e-6  # the rounding of a cosine in float32; far below it the quotient overflows
# words that name nothing to see in a picture
STOP_WORDS = (
    "a an the am is are was were be been being do does did have has had can could will would shall should may"
    " might must i you he she it we they me him her us them my your his its our their this that these those"
    " what which who whom whose when where why how and or but if so nor question answer of in on at to from"
    " for with by about as into"
)


def stop_ids(tokenizer: Any, template: str = "") -> tuple[int, ...]:
    """Token ids for the option `ignored`: special tokens, `STOP_WORDS`, and all tokens of a chat template.

    Args:
        tokenizer: of transformers, such as `processor.tokenizer`.
        template: the text that stands around every question.
    """
    ids = {*tokenizer.all_special_ids, *tokenizer.encode(template, add_special_tokens=False)}
    for word in (
        form for w in STOP_WORDS.split() for form in (w, w.capitalize(), f" {w}", f" {w.capitalize()}")
    ):
        pieces = tokenizer.encode(word, add_special_tokens=False)
        if len(pieces) == 1:
            ids.update(pieces)
    return tuple(sorted(ids))


@register(
    "mmtok",
    summary="Keep the tokens that cover the prompt's words and all visual tokens best: greedy maximum "
    "coverage.",
    stages=("projector",),
    paper="MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs, arXiv 2508.18264",
    code="github.com/Ironieser/MMTok",
    code_licence="Apache-2.0",
    differs="Words are the prompt's own text tokens, template included unless `ignored` names them; the "
    "public code takes the question from the processor's call, removes stop words and tokenises the others "
    "one by one. Padding around a picture is passed over where the model tells where the picture lies, and "
    "never chosen twice. Every image, crop or frame keeps its part of the budget.",
)
@dataclass
class MMTok(Strategy):
    """Multimodal maximum coverage (arXiv 2508.18264).

    A word covers the n visual tokens of an image, crop or frame by the softmax of its cosines with their
    projected features over `text_temperature`, divided by the number of words; a visual token covers them by
    that of its cosines in the features of the tower over `vision_temperature`, divided by n, times `alpha`.
    Tokens are added greedily that raise the sum, over words and visual tokens, of the largest value of a kept
    token most. The (words + n) x n values are held in float32. The text is that of the turn that brings the
    picture: later questions find what the first one left.

    Args:
        text_temperature, vision_temperature: of the two softmaxes; the public code has 0.01 and 0.2 for
            Qwen2.5-VL.
        alpha: weight of visual tokens against words; 0 covers words alone.
        ignored: ids of text tokens that are no words to cover, such as `mmtok.stop_ids(tokenizer)`. If
            nothing else is left, all are covered.
        vision: "tower" compares visual tokens as the tower gives them (the mean over the patches of a token),
            "projected" after the projector; an extension for models whose tower is not read.
        keep_newline: keep image-newline and separator rows on top of the budget.
    """

    _: KW_ONLY
    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    alpha: float = 0.5
    ignored: tuple[int, ...] = ()
    vision: Vision = "tower"
    keep_newline: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.text_temperature, self.vision_temperature) < COLDEST:
            raise ValueError(
                f"text_temperature and vision_temperature must be at least {COLDEST}, found"
                f" {self.text_temperature} and {self.vision_temperature}."
            )
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be a finite number of at least 0, found {self.alpha}.")

    def needs(self, tower: TowerInfo | None) -> Needs:
        return replace(vision_needs(self.vision, tower), text_embeddings=True)

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        each = zip(super().counts(segments, budget), segments, strict=True)
        return [min(count, int(_inside(segment).sum())) for count, segment in each]

    def select(self, tokens: VisualTokens) -> Selection:
        words, rows = self._words(tokens), rows_per_segment(tokens)
        kept = [tokens.separator_rows] if self.keep_newline else []
        parts = local_cells(tokens, rows), vision_features(tokens, self.vision), tokens.segments
        for mine, cells, x, segment, count in zip(rows, *parts, self.counts(tokens.segments), strict=True):
            if not len(mine):
                continue
            told = (cosines(words, tokens.features[mine]) / self.text_temperature).softmax(-1)
            seen = (cosines(x, x) / self.vision_temperature).softmax(-1)
            values = torch.cat([told / max(1, len(told)), self.alpha * seen / len(seen)]).mT  # (n, words + n)
            allowed = _inside(segment).to(cells.device)[cells].nonzero()[:, 0]
            picks = greedy_cover(values[allowed][None], min(count, len(allowed)))[0]
            kept.append(mine[allowed[picks]])
        return Selection(torch.cat(kept).sort().values)

    def _words(self, tokens: VisualTokens) -> Tensor:
        """(m, d): the embeddings of the words to cover."""
        text = tokens.text_embeddings
        if text is None:
            return tokens.features[:0]
        if not self.ignored:
            return text
        if tokens.text_ids is None:
            raise ValueError(
                "ignored names ids of text tokens, found a prompt of embeddings: pass input_ids, or leave out"
                " ignored."
            )
        words = ~torch.isin(tokens.text_ids, tokens.text_ids.new_tensor(self.ignored))
        return text[words] if bool(words.any()) else text


def _inside(segment: Segment) -> Tensor:
    """(size,) bool: the cells with a part of the picture; all if the model unpads, or tells of no padding."""
    x0, y0, x1, y1 = segment.cell_boxes().mT
    inside = (x1 > 1e-9) & (y1 > 1e-9) & (x0 < 1 - 1e-9) & (y0 < 1 - 1e-9)
    return inside if segment.fed == segment.size and bool(inside.any()) else torch.ones_like(inside)
