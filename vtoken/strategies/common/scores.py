"""Scores that several strategies share."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...tokens import Needs, VisualTokens

Score = Literal["cls", "received"]


def attention_needs(score: str, layers: tuple[int, ...]) -> Needs:
    """Declare CLS rows or received attention of some tower layers."""
    layers = tuple(sorted(set(layers)))
    return Needs(cls_attention=layers) if score == "cls" else Needs(received_attention=layers)


def attention_scores(tokens: VisualTokens, score: str, layer: int) -> Tensor:
    """(segments, cells) float32: CLS attention, mean over heads, or attention received."""
    return tokens.cls_attention(layer).mean(1) if score == "cls" else tokens.received_attention(layer)
