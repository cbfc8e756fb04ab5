"""Scores that several strategies share."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...tokens import Needs, TowerInfo, VisualTokens

Score = Literal["cls", "received"]
AnyScore = Literal["auto", "cls", "received"]


def score_of(score: AnyScore, tower: TowerInfo | None) -> Score:
    """The score itself; for "auto" the CLS row where the tower has one, attention received elsewhere."""
    if score != "auto":
        return score
    return "cls" if tower is None or tower.has_cls else "received"


def attention_needs(score: str, layers: tuple[int, ...]) -> Needs:
    """Declare CLS rows or received attention of some tower layers."""
    layers = tuple(sorted(set(layers)))
    return Needs(cls_attention=layers) if score == "cls" else Needs(received_attention=layers)


def attention_scores(tokens: VisualTokens, score: str, layer: int) -> Tensor:
    """(segments, cells) float32: CLS attention, mean over heads, or attention received."""
    return tokens.cls_attention(layer).mean(1) if score == "cls" else tokens.received_attention(layer)
