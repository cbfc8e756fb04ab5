"""TempMe: merge inside frames, then across neighbouring clips of a video, inside a CLIP image tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..kernels import bipartite_match
from ..selection import EncoderMerge
from ..tokens import EncoderShape, EncoderTokens
from .common.clips import (
    add_positions,
    clips_before,
    default_factors,
    load_positions,
    save_positions,
    vectors_of,
    zero_positions,
)
from .merging import EncoderStrategy
from .registry import register


class Step(NamedTuple):
    """One layer: sequences that are fused before it, tokens merged before its attention and after it."""

    fuse: int
    before: int
    after: int


@register(
    "tempme",
    summary="Merge similar tokens inside every frame, then fuse neighbouring clips of a video and merge "
    "across them, inside a CLIP image tower; every frame keeps its class token.",
    stages=("encoder",),
    budget_means="encoder",
    paper="TempMe: Video Temporal Token Merging for Efficient Text-Video Retrieval, arXiv 2409.01156",
    code="github.com/LunarShen/TempMe",
    code_licence="MIT",
    differs="The tokens removed per layer are capped at half of the patches in every layer (the code does not"
    " cap r). Other depths, frame numbers and encoders than CLIP ViT-B with 12 frames, and budgets, are ours."
    " encode_image gives one embedding per frame; their normalised mean is the paper's of the video."
    " The published figures are those after training; without it the late layers mix frames that they never"
    " saw together.",
)
@dataclass
class TempMe(EncoderStrategy):
    """Video temporal token merging (arXiv 2409.01156).

    A batch holds the frames of one video after the other. Layers before the first of `layers` merge `r` patch
    tokens inside every frame, as ToMe does. Each of `layers` first fuses neighbouring clips into one sequence
    and merges across them by the residual stream, then, between attention and MLP, merges inside the new clip
    by keys; later layers do the second only. The share of tokens that a merge removes counts class tokens, in
    truncated whole numbers, and at most half of the patches go.

    Args:
        budget: share of the patch tokens that is left at the end; decides r.
        frames: frames of a video.
        r: tokens that every early layer removes from a frame.
        layers: 0-based layers that fuse; by default the last but one and as many before it as there are
            factors, one apart in 12 layers, two apart in 24.
        fuse: clips that each of them fuses; by default the factors of `frames`, three at most (2, 2, 3 of
            12).
        cross: share of the tokens that a merge across clips removes; 0.4, with intra=0.2 and r=10, brings
            CLIP ViT-B/16 to the published 5% of tokens.
        intra: share of the tokens that a merge inside a clip removes.
        prop_attn: add the logarithm of a token's size to the attention logits of its key.
        frame_positions: safetensors file of trained frame positions, see `save_frame_positions`.
    """

    frames: int = 12
    r: int = 2
    layers: tuple[int, ...] | None = None
    fuse: tuple[int, ...] | None = None
    cross: float = 0.3
    intra: float = 0.1
    prop_attn: bool = True
    frame_positions: str | None = None

    serves_llms: ClassVar[bool] = False
    needs_cls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.frames <= 65536 or self.r < 0:
            raise ValueError(f"frames lies in 1..65536 and r is 0 or more, found {self.frames}, {self.r}.")
        if any(not 0 <= share < 1 for share in (self.cross, self.intra)):
            raise ValueError(f"cross and intra lie in [0, 1), found {self.cross} and {self.intra}.")
        factors, layers = self.factors, self.layers
        if any(f < 2 for f in factors) or self.frames % math.prod(factors):
            raise ValueError(
                f"fuse has factors of at least 2 whose product divides frames={self.frames}, found {factors}."
            )
        if layers is not None and (len(layers) != len(factors) or list(layers) != sorted(set(layers))):
            raise ValueError(
                f"layers names one ascending layer for each of the {len(factors)} factors {factors} of fuse,"
                f" found {layers}."
            )

    @property
    def factors(self) -> tuple[int, ...]:
        """Clips that each fusing layer makes one."""
        return default_factors(self.frames) if self.fuse is None else self.fuse

    def _fusing(self, layers: int) -> dict[int, int]:
        """By layer, the clips that it fuses."""
        step, count = max(1, layers // 12), len(self.factors)
        at = self.layers or [layers - 2 - (count - 1 - i) * step for i in range(count)]
        if at and not 0 <= at[0] <= at[-1] < layers:
            raise ValueError(
                f"tempme fuses in layers {tuple(at)}, and this encoder has 0..{layers - 1}: give other"
                " layers, or fewer factors in fuse."
            )
        return dict(zip(at, self.factors, strict=True))

    def encoder_plan(self, shape: EncoderShape) -> list[Step]:
        self._load_positions()
        if self.budget is None:
            return self._plan(shape, self.r)[0]
        wanted = self.allowance().share_of(shape.patches)
        reached = [self._plan(shape, r)[1] for r in (0, shape.patches // 2)]
        if not reached[1] <= wanted <= reached[0]:
            raise ValueError(
                f"tempme leaves between {reached[1]:.3f} and {reached[0]:.3f} of the patch tokens with"
                f" cross={self.cross} and intra={self.intra}, found budget={self.budget}."
            )
        plans = (self._plan(shape, r) for r in range(shape.patches // 2 + 1))
        return next(steps for steps, left in plans if left <= wanted)

    def _plan(self, shape: EncoderShape, r: int) -> tuple[list[Step], float]:
        """The steps, and the share of the patch tokens that they leave."""
        tokens, prefix, clips, steps = shape.patches + shape.prefix, shape.prefix, 1, []
        fusing = self._fusing(shape.layers)
        first = min(fusing, default=shape.layers)
        for layer in range(shape.layers):
            fuse, before = fusing.get(layer, 1), 0
            if fuse > 1:
                before = min(int(tokens * fuse * self.cross), (tokens - prefix) * fuse // 2)
                tokens, prefix, clips = tokens * fuse - before, prefix * fuse, clips * fuse
            after = min(r if layer < first else int(tokens * self.intra), (tokens - prefix) // 2)
            tokens -= after
            steps.append(Step(fuse, before, after))
        return steps, (tokens - prefix) / (clips * shape.patches)

    def begin_encoder(self, run: Any) -> None:
        if run.rows % self.frames:
            raise ValueError(
                f"tempme reads videos of {self.frames} frames, and {run.rows} images are no whole number of"
                " them: give all frames of every video, one video after the other, or patch with frames=... ."
            )

    def asked(self, layer: int, plan: Sequence[Step]) -> bool:
        return layer < len(plan) and (plan[layer].fuse > 1 or plan[layer].after > 0)

    def enter_layer(self, x: Tensor, run: Any) -> Tensor:
        step: Step = run.plan[run.layer]
        if step.fuse == 1:
            return x
        clips = self.frames // run.fused
        x = run.fuse(x, step.fuse)
        if not step.before:
            return x
        _, _, keep, into = bipartite_match(x.detach(), step.before, run.prefix)
        if self.trained_positions is not None:
            index = sum(earlier.fuse > 1 for earlier in run.plan[: run.layer])
            vectors = vectors_of(self.trained_positions.to(x.device), index, (clips, x.shape[2]))
            x = add_positions(x, vectors, step.fuse, run.prefix)
        return run.merge(x, EncoderMerge.weighted(keep, into, run.ones(x)))

    def merge_in_encoder(self, tokens: EncoderTokens) -> EncoderMerge | None:
        after = tokens.plan[tokens.layer].after
        if not after or tokens.keys is None:
            return None
        _, _, keep, into = bipartite_match(tokens.keys(), after, tokens.prefix)
        return EncoderMerge.weighted(keep, into, tokens.sizes)

    @property
    def trained_positions(self) -> nn.ParameterList | None:
        """The frame positions, (clips, width) per fusing layer; None if none were made or loaded."""
        return self.__dict__.get("_positions")

    def make_frame_positions(self, width: int) -> nn.ParameterList:
        """Trainable vectors (clips, width) of every fusing layer, zero at first, held by the strategy."""
        self.__dict__["_positions"] = made = zero_positions(clips_before(self.frames, self.factors), width)
        return made

    def save_frame_positions(self, path: str | Path) -> None:
        """Write the frame positions to a safetensors file. Raises ValueError if there are none."""
        save_positions(self.trained_positions, path)

    def _load_positions(self) -> None:
        """Read the file that `frame_positions` names, once."""
        if self.frame_positions is not None and self.__dict__.get("_file") != self.frame_positions:
            loaded = load_positions(self.frame_positions, clips_before(self.frames, self.factors))
            self.__dict__.update(_positions=loaded, _file=self.frame_positions)
