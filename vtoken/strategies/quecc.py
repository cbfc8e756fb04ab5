"""QueCC: each token is made of a cell of the tower's map by attention that knows the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor, nn

from ..tokens import Needs, TowerInfo, VisualTokens
from .common.time_steps import shuffled
from .grid_compressor import MOST_PLACES, GridCompressor, added_mlp
from .registry import register
from .trained import ModelShape

DEPTHS = (0.5, 0.68, 0.95, 1.0)  # layers 11, 15, 21 and 22 of CLIP-L, of which the projector reads layer 22


def normed_mlp(inner: int, width: int) -> nn.Sequential:
    layers = (nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, 1e-6))
    return nn.Sequential(*layers)


class Weights(nn.Module):
    """The weights of QueCC: projections of text, queries, keys and values, and attention within cells."""

    text: nn.Sequential | None

    def __init__(self, strategy: QueCC, model: ModelShape) -> None:
        super().__init__()
        assert model.tower is not None
        width, side = model.tower_width, strategy.side
        inner = width * len(strategy.layers_read(model.tower))
        self.text = None
        if strategy.conditioned:
            norm = nn.LayerNorm(width, 1e-6)
            nn.init.zeros_(norm.weight)
            self.text = nn.Sequential(nn.Linear(model.width, width), norm)
        self.query, self.key, self.value = (normed_mlp(n, width) for n in (width, inner, inner))
        self.down = nn.Conv2d(width, width, side, side, groups=width)
        self.attention = nn.MultiheadAttention(width, strategy.heads, batch_first=True)
        self.out = added_mlp(width, model.width)

    def forward(self, maps: Sequence[Tensor], question: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Maps (t, h, w, C), the projector's last, and a question (d,) -> (t, rows * columns, d)."""
        side, like = self.down.kernel_size[0], self.down.weight
        cells = [shuffled(m.to(like), *grid, side).unflatten(-1, (side * side, -1)) for m in maps]
        cells = [c.flatten(0, 1) for c in cells]  # (t * rows * columns, side * side, C)
        asked = cells[-1]
        if self.text is not None and question is not None:
            asked = asked + self.text(question.to(like))
        squares = self.query(asked).transpose(1, 2).unflatten(-1, (side, side))
        query, every = self.down(squares).flatten(2).transpose(1, 2), torch.cat(cells, -1)
        mixed = self.attention(query, self.key(every), self.value(every), need_weights=False)[0]
        return self.out(mixed[:, 0]).unflatten(0, (len(maps[-1]), -1))


@register(
    "quecc",
    summary="Make one token of each cell of the picture, by trained attention that knows the question.",
    stages=("projector",),
    paper="Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters, arXiv 2411.03312",
    code="https://github.com/locuslab/llava-token-compression",
    code_licence="no licence stated",
    differs="The question is the LLM's output at the last token of all text of the prompt, its template"
    " included; the published code cuts the user's words out of the prompt. What is computed is added to the"
    " average of the model's own features, so that an untrained model answers as with pool; the published one"
    " goes through the projector in their place. Cells of any grid are resized to side x side places. The"
    " published models fine-tune the LLM as well, and their weights could not be had.",
)
@dataclass
class QueCC(GridCompressor):
    """Query-conditioned convolutional cross-attention (arXiv 2411.03312).

    The question is added to the tower's map. A convolution per channel makes a query of each cell, which
    attends to the keys and values of its own cell, taken from several tower layers.

    Args:
        budget: share of the visual tokens, or tokens per image or frame.
        tokens_per_frame: in place of a budget, tokens of every image, crop or frame.
        side: a token is made of side x side places of the tower's map.
        layers: tower layers that keys and values read; four between the middle and the projector's if None.
        heads: attention heads; they divide the channels of the tower.
        conditioned: whether the question is read.
    """

    _: KW_ONLY
    side: int = 4
    layers: tuple[int, ...] | None = None
    heads: int = 8
    conditioned: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes("heads")
        self.check_sizes("side", most=MOST_PLACES)

    def build(self, model: ModelShape) -> nn.Module:
        model.check_heads(self.heads)
        return Weights(self, model)

    def layers_read(self, tower: TowerInfo) -> tuple[int, ...]:
        last = tower.feature_layer
        layers = {round(d * last) for d in DEPTHS} if self.layers is None else {*self.layers, last}
        if min(layers) < 0 or max(layers) > last:
            raise ValueError(f"layers names some of the tower's layers 0..{last}, found {self.layers}.")
        return tuple(sorted(layers))

    def needs(self, tower: TowerInfo | None) -> Needs:
        return replace(super().needs(tower), question=self.conditioned)

    def connect(
        self, maps: Sequence[Tensor], steps: Tensor, grid: tuple[int, int], tokens: VisualTokens
    ) -> Tensor:
        return self.module(maps, tokens.question, grid)
