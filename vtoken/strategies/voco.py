"""VoCo-LLaMA: the LLM writes a picture into a few of its tokens, which alone are seen from then on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..selection import Selection
from ..tokens import PrefillTokens, Segment, VisualTokens
from .registry import register
from .trained import ModelShape, TrainedStrategy

MOST_CHANNELS = 2**16  # so that a config from elsewhere cannot ask for weights without end


class Adapter(nn.Module):
    """What is added to the hidden states of compression tokens before a layer; nothing at the start."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, 1e-6)
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.silu(self.down(self.norm(x))))


class Weights(nn.Module):
    """The weights of VoCo: the embedding of a compression token, and an adapter per layer of the LLM."""

    def __init__(self, strategy: VoCo, model: ModelShape) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(model.width))
        layers = model.llm.layers if strategy.rank else 0
        self.layers = nn.ModuleList(Adapter(model.width, strategy.rank) for _ in range(layers))


@register(
    "voco",
    summary="Let the LLM write a picture into a few tokens, all that later text sees and the KV cache keeps.",
    stages=("projector", "prefill", "cache"),
    paper="VoCo-LLaMA: Towards Vision Compression with Large Language Models, arXiv 2406.12275",
    code="https://github.com/Yxxxb/VoCo-LLaMA",
    code_licence="Apache-2.0 by its pyproject.toml",
    budget_means="cache",
    differs="The compression tokens are the last visual tokens of an image or frame, to which the trained"
    " embedding is added, where the published ones follow the image: the prompt keeps its length. Text after"
    " the picture sees the text before it, as in the paper's mask; the published code hides that too. The"
    " published model fine-tunes the LLM; here it stays as it is, and an adapter of `rank` channels before"
    " each layer changes the compression tokens. Its weights were never released.",
)
@dataclass
class VoCo(TrainedStrategy):
    """Compression tokens with an attention mask that hides the picture (arXiv 2406.12275).

    In every layer of the LLM what follows a picture sees its compression tokens only. The prompt is read in
    full; then the other visual tokens leave the KV cache, so that decoding and later turns are as they would
    be with the whole cache and the mask.

    Args:
        budget: share of the visual tokens, or tokens per image or frame, that are compression tokens.
        rank: inner channels of the adapters; 0 for none.
    """

    hides_pictures: ClassVar[bool] = True

    _: KW_ONLY
    rank: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rank <= MOST_CHANNELS:
            raise ValueError(f"rank must be at least 0 and at most {MOST_CHANNELS}, found {self.rank}.")

    def build(self, model: ModelShape) -> nn.Module:
        return Weights(self, model)

    def counts(self, segments: Sequence[Segment], budget: float | int | None = None) -> list[int]:
        return [s.fed for s in segments]

    def _total_kept(self, segments: Sequence[Segment], separators: int) -> int | None:
        return sum(s.fed for s in segments) + separators

    def compression_tokens(self, tokens: VisualTokens) -> Tensor:
        """(n,) bool: the last patches of every frame, or of an image with all its crops."""
        counts, segment = self.allowance().tokens(tokens.segments), tokens.segment_of
        if tokens.modality == "image":
            counts, segment = [max(1, sum(counts))], torch.where(segment < 0, -1, 0)
        marked = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.cells.device)
        for i, count in enumerate(counts):
            rows = (segment == i).nonzero()[:, 0]
            marked[rows[max(0, len(rows) - count) :]] = True
        return marked

    def select(self, tokens: VisualTokens) -> Selection:
        marked = self.compression_tokens(tokens)
        features = tokens.features + self.module.embedding.to(tokens.features) * marked[:, None]
        keep = torch.arange(len(tokens), device=marked.device)
        return Selection(keep, marked=marked, features=features)

    def adapt(self, layer: int, hidden: Tensor) -> Tensor:
        if not self.rank:
            return hidden
        # the LLM can be on other devices, and in another dtype, than the weights of a strategy
        return self.module.layers[layer](hidden.to(self.module.embedding))

    def prefill_layers(self, num_layers: int, entering: float = 1.0) -> tuple[int, ...]:
        return (num_layers,)

    def aligned_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(num_layers))

    def select_in_prefill(self, tokens: PrefillTokens) -> Selection:
        assert tokens.marked is not None
        return Selection(tokens.marked[tokens.visual_rows].nonzero()[:, 0])
