"""PVC: causal attention across frames in the vision tower, and a connector that compresses each frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..temporal import FrameSteps, Temporal
from ..tokens import TowerInfo, VisualTokens
from .common.pooling import RepeatOrder
from .common.time_steps import Connector, TemporalAttention, TimeEmbedding
from .grid_compressor import GridCompressor
from .registry import register
from .trained import ModelShape


class Weights(nn.Module):
    """The weights of PVC: temporal layers, their time embeddings, the connector."""

    def __init__(self, strategy: PVC, model: ModelShape) -> None:
        super().__init__()
        assert model.tower is not None
        layers, wide = strategy.layers_of(model.tower), strategy.te_dim
        make = (model.tower_width, model.tower.num_heads, wide, strategy.gate, strategy.window)
        self.layers = nn.ModuleDict({str(i): TemporalAttention(*make) for i in layers})
        times = ["all"] if strategy.te_shared else list(self.layers)
        self.times = nn.ModuleDict({name: TimeEmbedding(wide) for name in times})
        known = wide if strategy.connector_adaln else None
        self.connector = Connector(model.tower_width, strategy.side, model.width, known)

    def time(self, layer: int, steps: Tensor) -> Tensor:
        return self.times["all" if "all" in self.times else str(layer)](steps)


@register(
    "pvc",
    summary="Let frames attend to earlier ones in the vision tower; a trained connector compresses each.",
    stages=("encoder", "projector"),
    paper="PVC: Progressive Visual Token Compression for Unified Image and Video Processing in Large"
    " Vision-Language Models, arXiv 2412.09613",
    code="https://github.com/OpenGVLab/PVC",
    code_licence="MIT",
    budget_means="entrance",
    differs="The published weights and the code of the modules could not be had: what the abstract and the"
    " repository do not say is an option with our choice as default. The connector is added to the average of"
    " the model's own features, so that an untrained model answers as with pool; the published one takes"
    " their place.",
    experimental=True,
)
@dataclass
class PVC(GridCompressor):
    """Progressive compression: a frame encodes what earlier frames did not.

    In the last layers of the tower every token attends to the tokens at its place in its own and earlier
    frames, after a norm that is conditioned on the time step. The connector divides the frame into a grid of
    rectangles and makes one token of each. An image is a static video of `image_repeats` frames, whose tokens
    all enter the LLM. Temporal attention adds nothing and the connector adds nothing before training.

    Args:
        budget: share of the visual tokens, or tokens per image or frame; the frames of an image share it.
        tokens_per_frame: in place of a budget, tokens of every frame, also of each of an image's.
        image_repeats: frames of the static video that an image becomes.
        side: the connector reads side x side places of the tower's map per token.
        temporal_layers: tower layers; the last half of those before the projector if None.
        temporal_position: "before" the layer, or "after" its attention.
        te_shared: one time embedding for all layers, else one each.
        te_dim: width of the time embeddings.
        tau_kind: the time step is the "index" of the frame, or the "fraction" of the video before it.
        gate: trained factor on the temporal attention: a "vector", a "scalar" or "none".
        window: frames that a frame attends to, itself included; None for all, which a stream cannot have.
        include_cls: whether the class token attends too.
        connector_adaln: whether the connector knows the time step.
        repeat_order: order of an image's tokens: all frames of a "tile" (crop) before the next, all tiles of
            a "repeat" before the next one, or the frames of a rectangle at their "place" in the picture.
    """

    _: KW_ONLY
    image_repeats: int = 4
    side: int = 4
    temporal_layers: tuple[int, ...] | None = None
    temporal_position: Literal["before", "after"] = "before"
    te_shared: bool = True
    te_dim: int = 256
    tau_kind: Literal["index", "fraction"] = "index"
    gate: Literal["vector", "scalar", "none"] = "vector"
    window: int | None = 96
    include_cls: bool = True
    connector_adaln: bool = True
    repeat_order: RepeatOrder = "tile"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes("image_repeats", "side", "te_dim", "window")

    # -- what it adds to a model -----------------------------------------------------------------------------
    def build(self, model: ModelShape) -> nn.Module:
        return Weights(self, model)

    def layers_of(self, tower: TowerInfo) -> tuple[int, ...]:
        """The tower layers with temporal attention. Raises ValueError for those that the tower lacks."""
        count = tower.feature_layer + 1
        if self.temporal_layers is None:
            return tuple(range(count - max(1, count // 2), count))
        layers = tuple(sorted(set(self.temporal_layers)))
        if not layers or not 0 <= layers[0] <= layers[-1] < count:
            raise ValueError(
                f"temporal_layers names some of the tower's layers 0..{count - 1}, found"
                f" {self.temporal_layers}."
            )
        return layers

    def temporal(self, tower: TowerInfo) -> Temporal | None:
        after = self.temporal_position == "after"
        return Temporal(self.layers_of(tower), self.mix, after, self.image_repeats)

    @property
    def repeats(self) -> int:
        return self.image_repeats

    @property
    def order(self) -> RepeatOrder:
        return self.repeat_order

    def mix(self, layer: int, x: Tensor, steps: FrameSteps) -> Tensor:
        """Temporal attention before or in a layer: the frames (t, n, C) of all sequences."""
        if steps.streams and (self.window is None or self.tau_kind != "index"):
            raise ValueError("A stream of pvc needs a window and tau_kind='index': its end is not known.")
        block, out = self.module.layers[str(layer)], []
        for frames in x.split(steps.lengths):
            tau = torch.arange(len(frames), device=x.device) + steps.start
            time = self.module.time(layer, tau / len(frames) if self.tau_kind == "fraction" else tau)
            some = frames if self.include_cls else frames[:, steps.prefix :]
            mixed, steps.left[layer] = block(some, time, steps.past.get(layer, ()))
            out.append(mixed if self.include_cls else torch.cat([frames[:, : steps.prefix], mixed], 1))
        return torch.cat(out)

    def time_steps(self, step: int, of: int, frames: int) -> Tensor:
        steps = super().time_steps(step, of, frames)
        return steps / of if self.tau_kind == "fraction" else steps

    def connect(
        self, maps: Sequence[Tensor], steps: Tensor, grid: tuple[int, int], tokens: VisualTokens
    ) -> Tensor:
        return self.module.connector(maps[-1], steps, grid)
