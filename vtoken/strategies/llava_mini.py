"""LLaVA-Mini: a few trained queries read the picture, and the text reads all of it before the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokens import VisualTokens
from .common.decoder_block import DecoderBlock
from .grid_compressor import MOST_PLACES, GridCompressor, added_mlp
from .registry import register
from .trained import ModelShape

MOST_LAYERS = 128  # more than an LLM has; a config from elsewhere cannot ask for weights without end
SPAN = 24  # sides of the grid of CLIP-L at 336 pixels, on whose scale places are told


def places(rows: int, columns: int, width: int, like: Tensor) -> Tensor:
    """(rows * columns, width) sines and cosines of the middles of a grid's cells, half for each axis."""
    quarter = width // 4
    rates = 10000.0 ** (-torch.arange(quarter, device=like.device) / quarter)
    waves = []
    for n in (rows, columns):
        angles = ((torch.arange(n, device=like.device) + 0.5) * SPAN / n)[:, None] * rates
        waves.append(torch.cat([angles.sin(), angles.cos()], 1))
    down, across = waves[0][:, None].expand(-1, columns, -1), waves[1].expand(rows, -1, -1)
    grid = torch.cat([down, across], -1).flatten(0, 1)
    return F.pad(grid, (0, width - grid.shape[-1])).to(like)


class Compressor(nn.Module):
    """Queries of a grid that attend to the whole map of a picture; adds nothing at the start."""

    def __init__(self, tower_width: int, size: int, heads: int, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tower_width, size, size) * 0.02)
        self.norm_query, self.norm_map = nn.LayerNorm(tower_width), nn.LayerNorm(tower_width)
        self.attention = nn.MultiheadAttention(tower_width, heads, batch_first=True)
        self.out = added_mlp(tower_width, width)

    def forward(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps (t, h, w, C) -> (t, rows * columns, d)."""
        t, h, w, width = maps.shape
        seen = self.norm_map(maps.to(self.queries).flatten(1, 2))
        queries = F.interpolate(self.queries[None].float(), grid, mode="bicubic", align_corners=True)
        queries = self.norm_query(queries[0].flatten(1).T.to(seen)) + places(*grid, width, seen)
        keys = seen + places(h, w, width, seen)
        return self.out(self.attention(queries.expand(t, -1, -1), keys, seen, need_weights=False)[0])


class Weights(nn.Module):
    """The weights of LLaVA-Mini: the compressor, and the layers of pre-fusion."""

    def __init__(self, strategy: LLaVAMini, model: ModelShape) -> None:
        super().__init__()
        self.compressor = Compressor(model.tower_width, strategy.size, strategy.heads, model.width)
        self.layers = nn.ModuleList(DecoderBlock(model.llm) for _ in range(strategy.prefusion_layers))


@register(
    "llava_mini",
    summary="Trained queries compress the picture, and the text reads all of it in layers before the LLM.",
    stages=("projector",),
    paper="LLaVA-Mini: Efficient Image and Video Large Multimodal Models with One Vision Token,"
    " arXiv 2501.03895",
    code="https://github.com/ictnlp/LLaVA-Mini",
    code_licence="Apache-2.0 by its pyproject.toml",
    differs="The queries' answer goes through an MLP of its own and is added to the average of the model's"
    " features, so that an untrained model answers as with pool; the published one goes through the"
    " projector."
    " The queries of a trained grid are resized to the grid of the budget. Pre-fusion reads the prompt in its"
    " own order, where the published code puts the picture first, and all frames at once, where it takes the"
    " average over runs for one frame each. The published models fine-tune the LLM as well, and their weights"
    " could not be had.",
)
@dataclass
class LLaVAMini(GridCompressor):
    """Modality pre-fusion and query compression (arXiv 2501.03895).

    Trained queries attend to all of a picture and become its few tokens. Before that the text of the prompt
    reads all visual tokens in `prefusion_layers` layers of the LLM's shape, and the LLM reads the result in
    place of the text's embeddings. Text of a later turn, which goes on from the KV cache, and generated
    tokens stay as they are.

    Args:
        budget: share of the visual tokens, or tokens per image or frame.
        tokens_per_frame: in place of a budget, tokens of every image, crop or frame.
        prefusion_layers: layers in which the text reads the picture; 0 for none.
        size: queries are trained for a grid of size x size.
        heads: attention heads of the compressor; they divide the channels of the tower.
    """

    _: KW_ONLY
    prefusion_layers: int = 4
    size: int = 4
    heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes("heads")
        self.check_sizes("size", most=MOST_PLACES)
        if not 0 <= self.prefusion_layers <= MOST_LAYERS:
            raise ValueError(
                f"prefusion_layers must be at least 0 and at most {MOST_LAYERS}, found"
                f" {self.prefusion_layers}."
            )

    def build(self, model: ModelShape) -> nn.Module:
        model.check_heads(self.heads)
        return Weights(self, model)

    @property
    def fuses_text(self) -> bool:
        return self.prefusion_layers > 0

    def connect(
        self, maps: Sequence[Tensor], steps: Tensor, grid: tuple[int, int], tokens: VisualTokens
    ) -> Tensor:
        return self.module.compressor(maps[-1], grid)

    def fuse_text(self, embeddings: Tensor, visual: Tensor) -> Tensor:
        x = embeddings.to(self.module.compressor.queries)
        for layer in self.module.layers:
            x = layer(x)
        return x[~visual].to(embeddings)
