"""TempMe: merge inside frames, then across neighbouring clips of a video, inside a CLIP image tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import bipartite_match
from ..selection import EncoderMerge
from ..tokens import EncoderShape, EncoderTokens
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
    differs="The tokens removed per layer are capped at half of the patches in every layer (the code does not cap "
    "r). Other depths, frame numbers and encoders than CLIP ViT-B with 12 frames, and budgets, are ours. "
    "encode_image gives one embedding per frame, whose normalised mean is the paper's embedding of the video. "
    "The published figures are those after training; without it the late layers mix frames that they never saw "
    "together.",
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
        fuse: clips that each of them fuses; by default the factors of `frames`, at most three (2, 2, 3 of 12).
        cross, intra: shares of the tokens that merges across clips and inside a clip remove.
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
        if self.frames < 1 or self.r < 0:
            raise ValueError(f"frames is at least 1 and r at least 0, found {self.frames} and {self.r}.")
        if any(not 0 <= share < 1 for share in (self.cross, self.intra)):
            raise ValueError(f"cross and intra lie in [0, 1), found {self.cross} and {self.intra}.")
        product = math.prod(self.factors)
        if any(f < 2 for f in self.factors) or self.frames % product:
            raise ValueError(
                f"fuse has factors of at least 2 whose product divides frames={self.frames}, found {self.fuse}."
            )
        if self.layers is not None and (
            len(self.layers) != len(self.factors) or list(self.layers) != sorted(set(self.layers))
        ):
            raise ValueError(
                f"layers names one ascending layer for each of the {len(self.factors)} factors"
                f" {self.factors} of fuse, found {self.layers}."
            )

    @property
    def factors(self) -> tuple[int, ...]:
        """Clips that each fusing layer makes one."""
        if self.fuse is not None:
            return self.fuse
        left, factors = self.frames, []
        for prime in range(2, self.frames + 1):
            while left % prime == 0:
                left, factors = left // prime, [*factors, prime]
        while len(factors) > 3:
            factors = sorted([factors[0] * factors[1], *factors[2:]])
        return tuple(factors)

    def _fusing(self, layers: int) -> dict[int, int]:
        """By layer, the clips that it fuses."""
        step, count = max(1, layers // 12), len(self.factors)
        at = self.layers or [layers - 2 - (count - 1 - i) * step for i in range(count)]
        if at and not 0 <= at[0] <= at[-1] < layers:
            raise ValueError(f"layers must lie in 0..{layers - 1} of this encoder, found {tuple(at)}.")
        return dict(zip(at, self.factors, strict=True))

    def encoder_plan(self, shape: EncoderShape) -> list[Step]:
        if self.budget is None:
            return self._plan(shape, self.r)[0]
        wanted = self.allowance().share_of(shape.patches)
        most = shape.patches // 2
        reached = [self._plan(shape, r)[1] for r in (0, most)]
        if not reached[1] <= wanted <= max(reached[0], 1.0) or wanted > reached[0]:
            raise ValueError(
                f"tempme leaves between {reached[1]:.3f} and {reached[0]:.3f} of the patch tokens with"
                f" cross={self.cross} and intra={self.intra}, found budget={self.budget}."
            )
        low, high = 0, most
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._plan(shape, middle)[1] <= wanted else (middle + 1, high)
        return self._plan(shape, low)[0]

    def _plan(self, shape: EncoderShape, r: int) -> tuple[list[Step], float]:
        """The steps, and the share of the patch tokens that they leave."""
        fusing, tokens, prefix, clips = self._fusing(shape.layers), shape.patches + shape.prefix, shape.prefix, 1
        first, steps = min(fusing, default=shape.layers), []
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
        prefix, patches, clips = run.prefix, run.tokens - run.prefix, self.frames // run.fused
        x = run.fuse(x, step.fuse)
        if not step.before:
            return x
        _, _, keep, into = bipartite_match(x.detach(), step.before, run.prefix)
        vectors = self._vectors(run, x, clips)
        if vectors is not None:
            clip = torch.arange(step.fuse, device=x.device)
            each = torch.cat([clip.repeat_interleave(prefix), clip.repeat_interleave(patches)])
            per_sequence = vectors.view(clips // step.fuse, step.fuse, -1)[:, each]
            x = x + per_sequence.repeat(len(x) // len(per_sequence), 1, 1).to(x)
        return run.merge(x, EncoderMerge.weighted(keep, into, run.ones(x)))

    def merge_in_encoder(self, tokens: EncoderTokens) -> EncoderMerge | None:
        after = tokens.plan[tokens.layer].after
        if not after:
            return None
        assert tokens.keys is not None
        _, _, keep, into = bipartite_match(tokens.keys(), after, tokens.prefix)
        return EncoderMerge.weighted(keep, into, tokens.sizes)

    # -- frame positions -------------------------------------------------------------------------------------
    def make_frame_positions(self, width: int) -> nn.ParameterList:
        """Trainable vectors (clips, width) of every fusing layer, zero at first; they stay with the strategy."""
        clips, made = self.frames, []
        for factor in self.factors:
            made.append(nn.Parameter(torch.zeros(clips, width)))
            clips //= factor
        self.__dict__["_positions"] = positions = nn.ParameterList(made)
        return positions

    def _vectors(self, run: Any, x: Tensor, clips: int) -> Tensor | None:
        """(clips, C) of the running layer, None if there are none."""
        if "_positions" not in self.__dict__ and self.frame_positions is not None:
            from safetensors.torch import load_file

            stored = load_file(self.frame_positions)
            for own, name in zip(self.make_frame_positions(x.shape[2]), sorted(stored), strict=True):
                own.data.copy_(stored[name])
        if "_positions" not in self.__dict__:
            return None
        index = sum(step.fuse > 1 for step in run.plan[: run.layer])
        vectors: Tensor = self.__dict__["_positions"].to(x.device)[index]
        return vectors

    def save_frame_positions(self, path: str | Path) -> None:
        """Write the frame positions to a safetensors file. Raises ValueError if there are none."""
        from safetensors.torch import save_file

        positions = self.__dict__.get("_positions")
        if positions is None:
            raise ValueError("This strategy has no frame positions: call make_frame_positions(width) and train.")
        save_file({f"layer_{i}": p.detach().cpu().clone() for i, p in enumerate(positions)}, str(path))
