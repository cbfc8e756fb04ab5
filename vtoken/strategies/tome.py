"""ToMe: bipartite soft matching of attention keys merges a number of tokens in every layer."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels import bipartite_match
from ..selection import EncoderMerge
from ..tokens import EncoderShape, EncoderTokens
from .common.matching import kth_match
from .merging import ScheduledMerging
from .registry import register


@register(
    "tome",
    summary="Merge the most similar patch tokens inside the encoder, a number per layer, by a bipartite "
    "matching of attention keys; later layers weigh a token by the patches that it stands for.",
    stages=("encoder", "projector"),
    budget_means="encoder",
    paper="Token Merging: Your ViT But Faster, arXiv 2210.09461",
    code="github.com/facebookresearch/ToMe",
    code_licence="CC-BY-NC-4.0",
    differs="All prefix tokens are protected, registers included (the code protects a class and a "
    "distillation "
    "token), and without prefix the unmerged tokens stay in ascending order unless sort=False. Outputs have "
    "their unpatched length, every patch reading the token that it joined, so that mean and attention "
    "pooling "
    "weigh tokens by their sizes. Budgets and FLOPs as goals are ours, as is the use in the tower of a "
    "vision-language model, where one token per group enters the LLM, at the group's place on the grid, and "
    "crops that a model unpads are merged further, by their features, until the budget is met.",
)
@dataclass
class ToMe(ScheduledMerging):
    """Token merging (arXiv 2210.09461).

    In every layer the patch tokens at even positions each find their most similar token at an odd position,
    by the cosine of the attention keys averaged over heads; the r most similar pairs become their means,
    weighted by sizes. At most half of the tokens go in a layer. Give one of `budget`, `r`, `flops` and `kth`;
    without any, half of the patch tokens are left after the last layer.

    Args:
        sort: keep unmerged tokens in ascending order; False leaves them by falling similarity where the
            encoder has no prefix tokens, as the published code does.
        kth: instead of r, every `kth` consecutive patch tokens become one in the layers `kth_layers`: the
            last of every group absorbs, the others join their most similar one of these; left-over tokens at
            the end are dropped.
        kth_layers: the layers for `kth`.
    """

    sort: bool = True
    kth: int | None = None
    kth_layers: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kth is None:
            return
        if self.kth < 2 or any(x is not None for x in (self.budget, self.r, self.flops)):
            raise ValueError(
                f"kth is a group size of at least 2 in place of budget, r and flops, found kth={self.kth}."
            )

    @property
    def drops(self) -> bool:  # type: ignore[override]
        return self.kth is not None

    @property
    def is_identity(self) -> bool:
        return self.kth is None and super().is_identity

    def encoder_plan(self, shape: EncoderShape) -> tuple[int, ...]:
        if self.kth is None:
            return super().encoder_plan(shape)
        unknown = [i for i in self.kth_layers if not 0 <= i < shape.layers]
        if unknown:
            raise ValueError(
                f"kth_layers names layer {unknown[0]}, the encoder has layers 0 to {shape.layers - 1} that "
                f"count."
            )
        plan, n = [], shape.patches
        for layer in range(shape.layers):
            plan.append(n - n // self.kth if layer in self.kth_layers else 0)
            n -= plan[-1]
        if n < 1:
            raise ValueError(f"kth={self.kth} leaves none of {shape.patches} patch tokens: use fewer layers.")
        return tuple(plan)

    def merge_in_encoder(self, tokens: EncoderTokens) -> EncoderMerge | None:
        assert tokens.keys is not None
        if self.kth is not None:
            keep, into = kth_match(tokens.keys(), self.kth, tokens.prefix)
        else:
            sort = self.sort or tokens.prefix > 0
            _, _, keep, into = bipartite_match(tokens.keys(), tokens.plan[tokens.layer], tokens.prefix, sort)
        return EncoderMerge.weighted(keep, into, tokens.sizes)
