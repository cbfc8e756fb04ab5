"""The engine: kept tokens after the vision tower, and their positions before the LLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.logger import init_logger

from ...adapters.base import Layout
from ...adapters.towers.capture import Capture
from ...tokens import VisualTokens
from . import known_positions, uses_mrope
from .geometry import Geometry
from .positions import attach, detach, line_positions, prompt_positions, runs_of
from .reduction import MODALITIES, Announced, Reduction, field_of
from .rope import extend_rope
from .taps import TowerTap

WITHOUT_DRAFTER = ("ngram", "ngram_gpu", "suffix")  # vLLM's speculation that reads token ids alone


class PrunedModel:
    """Mixin before a vLLM model: it keeps as many tokens of an image or video as the processor announced.

    It needs nothing of the runner. `get_mrope_input_positions` gives text its final positions and kept tokens
    the start of their image; `embed_multimodal` appends their own positions as columns, `embed_input_ids`
    takes the columns off, and `forward` adds them. Nothing is remembered between steps, so chunks of a
    prompt, hits of the prefix cache and preemption need no care. The positions to add stand in a buffer that
    never moves, so captured graphs of `forward` add them too.

    Attributes:
        reduction: the strategy and the model's geometry.
        tells_positions: whether kept tokens bring their own positions.
        one_row: whether the LLM has one-dimensional positions.
        own_positions: (3, tokens of a step) int64, to add in the coming forward.
    """

    geometry_class: ClassVar[type[Geometry]] = Geometry
    own_positions: Tensor
    supports_mrope: ClassVar[bool] = True  # as vLLM's protocol, whose __init__ would stand before the model's

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        model, config = vllm_config.model_config, vllm_config.model_config.hf_config
        self.reduction = Reduction(config, self.geometry_class(config))
        self.tells_positions = bool(model.uses_mrope)
        self.one_row = not uses_mrope(config)
        self.largest_batch = int(vllm_config.scheduler_config.max_num_batched_tokens)
        rows = self.largest_batch if self.tells_positions else 0
        # a buffer, because vLLM restores those after a deep sleep
        self.register_buffer("own_positions", torch.zeros(3, rows, dtype=torch.int64), persistent=False)  # type: ignore[attr-defined]
        check_engine(vllm_config, self.tells_positions)
        if self.reduction.asked:
            check_positions(self.reduction.strategy.positions, self.tells_positions)
        tell(self.reduction)
        if self.tells_positions:  # the front end admits prompts up to the LLM's length, answers come on top
            rows = known_positions(model) + model.max_model_len
            extend_rope(self.language_model, rows)  # type: ignore[attr-defined]
        limit = model.multimodal_config.get_limit_per_prompt
        towers = self.reduction.geometry.adapter.towers if any(limit(m) for m in MODALITIES) else {}
        layers = {m: self.reduction.needs(m).tower_layers for m in towers}
        if any(layers.values()):
            check_tower(vllm_config, self.reduction.strategy.info.name)
        read = set().union(*layers.values()) if towers else set()
        self.tap = TowerTap(towers, self.attentions(), read) if read else None

    # -- to override -----------------------------------------------------------------------------------------
    def attentions(self) -> Sequence[nn.Module]:
        """Per layer of the vision tower, the module that is called with queries and keys."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its tower's attention is.")

    def part(self, modality: str, arguments: dict[str, Any], first: int, last: int) -> dict[str, Any]:
        """The arguments of `embed_multimodal` for some of its images or videos."""
        return {name: value[first:last] for name, value in arguments.items()}

    def tower_arguments(self, modality: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """Positional arguments of the transformers tower, for towers over one packed sequence."""
        return ()

    def rows(self, modality: str, arguments: dict[str, Any], layouts: list[Layout]) -> list[int]:
        """Per image or video, the segments that its tower forward has, padding included."""
        return [len(layout.segments) for layout in layouts]

    def read_width(self) -> int | None:
        """Columns of a feature read at its entrance, DeepStack has further ones; None for all."""
        return None

    # -- encoding --------------------------------------------------------------------------------------------
    def embed_multimodal(self, **kwargs: Any) -> Any:
        told = {m: kwargs.pop(field_of(m), None) for m in MODALITIES}
        modality = next((m for m, rows in told.items() if rows is not None), None)
        if modality is None:  # embeddings instead of pixels, whose tokens all stay
            features = super().embed_multimodal(**kwargs)  # type: ignore[misc]
            return [self._with_positions(f, line_positions(len(f))) for f in features]
        announced = [Announced.of(row) for row in told[modality]]
        layouts = self.reduction.geometry.layouts(modality, len(announced), kwargs)
        out: list[Tensor] = []
        for first, last in self._batches(modality, layouts):
            arguments = self.part(modality, kwargs, first, last)
            out += self._encode(modality, arguments, layouts[first:last], announced[first:last])
        return out

    def _batches(self, modality: str, layouts: list[Layout]) -> Iterator[tuple[int, int]]:
        """Stretches of images whose unshortened tokens fit into one step of the scheduler; videos one by one.

        The scheduler counts kept tokens, so it lets in more than the tower's memory has been measured for.
        """
        first, size, most = 0, 0, self.largest_batch if modality == "image" else 0
        for i, layout in enumerate(layouts):
            if i > first and size + len(layout.cells) > most:
                yield first, i
                first, size = i, 0
            size += len(layout.cells)
        yield first, len(layouts)

    def _encode(
        self, modality: str, arguments: dict[str, Any], layouts: list[Layout], announced: list[Announced]
    ) -> list[Tensor]:
        places = self.reduction.geometry.positions(modality, layouts, arguments)
        seen = self.reduction.geometry.seen_as(modality)
        capture = self._start(seen, arguments)
        try:
            features = super().embed_multimodal(**arguments)  # type: ignore[misc]
        finally:
            if self.tap is not None:
                self.tap.stop()
        rows = self.rows(modality, arguments, layouts)
        provided = [{}] * len(layouts) if capture is None else capture.per_item(rows)
        out = []
        for f, layout, place, told, values in zip(
            features, layouts, places, announced, provided, strict=True
        ):
            f = f.flatten(0, -2)
            if len(f) != len(layout.cells):
                raise RuntimeError(
                    f"vLLM makes {len(f)} tokens of a {modality} for which transformers makes"
                    f" {len(layout.cells)}: vtoken does not know this input."
                )
            info = self.reduction.geometry.adapter.towers[seen].info
            values = {key: value[: len(layout.segments)] for key, value in values.items()}
            cells = layout.cells.to(f.device)
            width = self.read_width() or f.shape[1]
            read, ride = f[:, :width], f[:, width:]
            tokens = VisualTokens(read, layout.segments, cells, info, modality, provided=values)  # type: ignore[arg-type]
            kept, keep = self.reduction.choose(tokens, told)
            kept = torch.cat([kept, ride if keep is None else ride[keep]], 1)
            out.append(self._with_positions(kept, place if keep is None else place[:, keep.cpu()]))
        return out

    def _start(self, modality: str, arguments: dict[str, Any]) -> Capture | None:
        needs = self.reduction.needs(modality)
        if self.tap is None or not needs.tower_layers or modality not in needs.modalities:
            return None
        return self.tap.start(modality, needs, self.tower_arguments(modality, arguments))

    def _with_positions(self, features: Tensor, positions: Tensor) -> Tensor:
        return attach(features, positions) if self.tells_positions else features

    # -- positions -------------------------------------------------------------------------------------------
    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        items = []
        for feature in mm_features:
            place, field = feature.mm_position, feature.data.get(field_of(feature.modality))
            runs = [(0, place.length)] if place.is_embed is None else runs_of(place.is_embed)
            told = [(b - a, b - a) for a, b in runs] if field is None else Announced.of(field.data).runs()
            for (first, last), (_, reach) in zip(runs, told, strict=True):
                items.append((place.offset + first, last - first, reach))
        return prompt_positions(len(input_tokens), items)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        if self.tells_positions and multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            parts = [detach(e) for e in multimodal_embeddings]
            multimodal_embeddings = [features for features, _ in parts]
            places = is_multimodal.nonzero()[:, 0].to(self.own_positions.device)
            self.own_positions[:, places] = torch.cat([p for _, p in parts], 1).to(self.own_positions)
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.tells_positions:
            own = self.own_positions[:, : positions.shape[1]]
            # in place: the runner fills this buffer anew for every step, captured graphs read it where it is
            positions += own
            own.zero_()  # once: vLLM's dummy runs follow without an embed_input_ids
        if self.tells_positions and self.one_row:
            positions = positions[0]  # of three equal rows, the first is contiguous and stays where it is
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]


def tell(reduction: Reduction) -> None:
    """Write to vLLM's log what this model is served with."""
    log = init_logger("vllm.vtoken")
    strategy = reduction.strategy
    if reduction.asked:
        log.info("vtoken: %s, %s positions", strategy.describe(), strategy.positions)
    else:
        log.warning("vtoken: the configuration names no strategy, so that all visual tokens are read")


def check_engine(vllm_config: Any, tells_positions: bool) -> None:
    """Raise ValueError, in one sentence, for settings of the engine under which answers would be wrong."""
    if vllm_config.model_config.multimodal_config.video_pruning_rate:
        raise ValueError("vtoken and --video-pruning-rate both drop tokens: choose one.")
    lora = vllm_config.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        raise ValueError(
            "vLLM counts kept tokens for LoRA on the vision tower: leave enable_tower_connector_lora off."
        )
    if not tells_positions:
        return
    off = {
        "enable_prompt_embeds": vllm_config.model_config.enable_prompt_embeds,
        "enable_dbo": vllm_config.parallel_config.enable_dbo,
    }
    if wrong := [name for name, on in off.items() if on]:
        raise ValueError(
            f"{wrong[0]} does not go with original positions: leave it off, or use positions='renumber' where"
            " the LLM has one-dimensional positions."
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "Original positions are known in the first pipeline stage only: use tensor parallelism, or"
            " positions='renumber' where the LLM has one-dimensional positions."
        )
    drafter = vllm_config.speculative_config
    if drafter is not None and drafter.method not in WITHOUT_DRAFTER:
        raise ValueError(
            f"Embeddings that carry original positions do not fit the drafter of {drafter.method}: speculate"
            f" with {' or '.join(WITHOUT_DRAFTER)}, or use positions='renumber' where the LLM has"
            " one-dimensional positions."
        )


def check_positions(wanted: str, told: bool) -> None:
    """Raise ValueError if the strategy's positions are not those that vLLM's configuration leads to."""
    if (wanted == "original") != told:
        raise ValueError(
            f"The overrides want {wanted} positions and their rope_parameters lead to the others: take"
            " architectures, vtoken and rope_parameters together from vtoken.integrations.vllm.overrides, and"
            " scale rope in text_config."
        )


def check_tower(vllm_config: Any, name: str) -> None:
    """Raise ValueError, in one sentence, for settings under which the tower's attention cannot be read."""
    if vllm_config.compilation_config.compile_mm_encoder:
        raise ValueError(f"{name} reads attention of the vision tower: leave compile_mm_encoder off.")
    config = vllm_config.model_config.multimodal_config
    if config.mm_encoder_tp_mode == "data" and vllm_config.parallel_config.tensor_parallel_size > 1:
        raise ValueError(
            f"{name} reads attention of the vision tower, which mm_encoder_tp_mode='data' computes on other"
            " ranks: use mm_encoder_tp_mode='weights'."
        )
