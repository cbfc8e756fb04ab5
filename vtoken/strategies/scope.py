"""SCOPE: the salient tokens that cover all others best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from ..tokens import Needs, TowerInfo, VisualTokens
from .common.grouping import local_cells
from .common.scores import AnyScore, attention_needs, attention_scores, score_of
from .coverage import Coverage
from .registry import register


@register(
    "scope",
    summary="Keep, one by one, the token whose gain in coverage of all tokens, times its attention, is "
    "largest.",
    stages=("projector",),
    paper="SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs, arXiv 2510.24214",
    code="github.com/kinredon/SCOPE",
    code_licence="no licence stated",
    differs="Gains are computed in float32 (in half precision late gains vanish in rounding), and equal "
    "ones go to the lower index. The public code can also add the attention instead of multiplying by it, "
    "which is left out. Towers without a CLS token weigh by attention received, as Tencent's AngelSlim "
    "does; that compares the projected features (vision='projected') of all images of a prompt as one set, "
    "here every image, crop or frame is one.",
)
@dataclass
class SCOPE(Coverage):
    """Saliency-coverage oriented pruning (arXiv 2510.24214).

    With the cosines `S` of the tokens of an image, crop or frame, a token j is covered by `c_j = max(0, max
    S_ij)` over the chosen tokens i. Each step adds the token i with the largest `a_i^alpha sum_j max(0, S_ij
    - c_j)`, where `a` is the attention that the CLS token pays in the layer that makes the features, averaged
    over heads. Every image, crop or frame keeps its part of the budget. The n x n cosines of a segment are
    held in float32.

    Args:
        vision: the features that are compared: "tower", the vision tower's output for the projector (the mean
            over the patches of a token), or "projected".
        keep_newline: keep image-newline and separator rows on top of the budget.
        alpha: exponent of the attention; 0 is `coverage`.
        score: "cls", "received" (attention received by each patch), or "auto" by the tower.
    """

    _: KW_ONLY
    alpha: float = 1.0
    score: AnyScore = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be a finite number of at least 0, found {self.alpha}.")

    def saliency_needs(self, tower: TowerInfo | None) -> Needs:
        layers = (0,) if tower is None else tower.layers_up_to_feature(1)
        return attention_needs(score_of(self.score, tower), layers)

    def saliency(self, tokens: VisualTokens, rows: Sequence[Tensor]) -> list[Tensor]:
        assert tokens.tower is not None
        layer = tokens.tower.layers_up_to_feature(1)[0]
        attention = attention_scores(tokens, score_of(self.score, tokens.tower), layer)
        each = zip(attention, local_cells(tokens, list(rows)), strict=True)
        of_tokens = [row[cells].float().clamp(min=0) for row, cells in each]
        # of the largest, or a power of them would leave the range of float32
        return [(a / a.max().clamp(min=1e-30)).pow(self.alpha) if len(a) else a for a in of_tokens]
