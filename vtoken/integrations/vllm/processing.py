"""The front end: how many placeholders an image or video gets in the prompt."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing.processor import PromptUpdateDetails

from ...adapters.base import Layout
from . import known_positions, uses_mrope
from .geometry import Geometry
from .positions import runs_of
from .reduction import BUDGET, MODALITIES, PIXELS, Announced, Reduction, field_of
from .vllm_names import check_names

check_names()


@dataclass
class Shortened(PromptUpdateDetails):
    """The placeholders of one image or video; vLLM caches them, so they are known where its pixels are not.

    Attributes:
        dropped: positions that it takes beyond its kept tokens.
    """

    dropped: int = 0


def without_budget(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Processor arguments without vtoken's own."""
    return {k: v for k, v in kwargs.items() if k != BUDGET}


def budget_of(kwargs: Mapping[str, object]) -> Any:
    """A request's own budget, None if it has none.

    Raises:
        ValueError: for another argument of vtoken's, one among the arguments of a single modality, where
            nobody would read it, and 1, which is one token.
    """
    for name, value in kwargs.items():
        if name.startswith("vtoken") and name != BUDGET:
            raise ValueError(f"vtoken has no argument {name} of requests: it takes {BUDGET}.")
        if isinstance(value, Mapping) and BUDGET in value:
            raise ValueError(
                f"{BUDGET} is one number for the whole request, found in {name}: give it directly in"
                " mm_processor_kwargs."
            )
    budget = kwargs.get(BUDGET)
    if isinstance(budget, int) and budget == 1:
        raise ValueError(
            f"{BUDGET}=1 is one token, and many JSON writers write 1.0, all tokens, as well: send 2 or more"
            " tokens, a share below 1, or a number as large as the picture for all of it."
        )
    return budget


class PrunedInfo:
    """Mixin before a `BaseProcessingInfo`: the transformers processor is not told vtoken's option."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        return super().get_hf_processor(**without_budget(kwargs))  # type: ignore[misc]


class PrunedProcessor:
    """Mixin before a `BaseMultiModalProcessor` whose replacements repeat a placeholder, in one run or more.

    The number of kept tokens is decided here, once, and travels with the item as a field. The item's hash
    contains the request's budget and the server's settings, so vLLM's caches keep items of different budgets
    apart.
    """

    info: Any
    geometry_class: ClassVar[type[Geometry]] = Geometry

    @functools.cached_property
    def reduction(self) -> Reduction:
        """The strategy that the configuration asks for."""
        config = self.info.get_hf_config()
        if BUDGET in (self.info.ctx.model_config.multimodal_config.mm_processor_kwargs or {}):
            raise ValueError(f"{BUDGET} is for requests: give the server's budget in the overrides.")
        return Reduction(config, self.geometry_class(config))

    @functools.cached_property
    def mark(self) -> str:
        """Eight letters that differ between strategies and settings."""
        told = json.dumps(self.info.get_hf_config().vtoken, sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:8]

    def announced(self, modality: str, data: Mapping[str, Any], budget: Any) -> list[Announced]:
        """Per image or video of a processor's output, what will stay of it.

        Args:
            budget: the request's own or None.
        """
        count = self.count(modality, data)
        if not count:
            return []
        geometry, arguments = self.reduction.geometry, dict(data)
        layouts = geometry.layouts(modality, count, arguments)
        places = geometry.positions(modality, layouts, arguments)
        told = []
        for layout, positions in zip(layouts, places, strict=True):
            told.append(self.reduction.announce(modality, layout, positions, budget))
            if budget is not None:
                self.check_size(modality, layout, positions)
        return told

    def check_size(self, modality: str, layout: Layout, positions: torch.Tensor) -> None:
        """Raise ValueError for an image or video that would not fit at the server's own budget.

        A request's small budget shortens the prompt, not the work of the vision tower.
        """
        most = self.info.ctx.model_config.max_model_len
        try:
            usual = self.reduction.announce(modality, layout, positions)
        except ValueError:  # the server's budget does not serve it at any size
            usual = self.reduction.announce(modality, layout, positions, 1.0)
        if usual.kept > most:
            raise ValueError(
                f"This {modality} has {usual.kept} tokens at the server's own budget, more than the {most} of"
                f" its longest prompt, and {BUDGET} does not make it smaller for the vision tower: send a"
                " smaller one."
            )

    def count(self, modality: str, data: Mapping[str, Any]) -> int:
        """Images or videos of a processor's output that came as pixels."""
        pixels = data.get(PIXELS[modality])
        return 0 if pixels is None else len(pixels)

    def check_positions(self, tokens: int, updates: Mapping[str, Any]) -> None:
        """Raise ValueError for a prompt whose original positions end after those that the LLM knows.

        Args:
            tokens: of the shortened prompt.
            updates: per modality the updates of every image or video, cached or not.
        """
        contents = [one.content for items in updates.values() for item in items for one in item]
        last = tokens + sum(content.dropped for content in contents if isinstance(content, Shortened))
        most = known_positions(self.info.ctx.model_config)
        if last > most:
            raise ValueError(
                f"The original positions of this prompt end at {last}, the LLM knows {most}: send fewer"
                " images or videos, or serve with positions='renumber' where the LLM has one-dimensional"
                " positions."
            )

    # -- vLLM's own names ------------------------------------------------------------------------------------
    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        try:
            return super().apply(inputs, timing_ctx)  # type: ignore[misc]
        except Exception:  # vLLM asserts that every image has a placeholder
            if inputs.cache is not None:  # it takes the items of a refused prompt for sent
                for hashes in self._get_mm_hashes(inputs).values():
                    for one in hashes:
                        inputs.cache.invalidate(one)
            raise

    def _get_mm_hashes(self, inputs: Any) -> Any:
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        if not self.reduction.asked:
            return hashes
        # stores of features and keys outlive a server, and the next one may have another strategy
        return {modality: [f"{one}-{self.mark}" for one in ones] for modality, ones in hashes.items()}

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        made = super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        if self.info.ctx.model_config.uses_mrope:
            self.check_positions(len(made[0]), mm_res.prompt_updates)
        return made

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        budget = budget_of(hf_kwargs)
        data = super()._apply_hf_processor_main(mm_items, without_budget(hf_kwargs))  # type: ignore[misc]
        for modality in MODALITIES:
            if rows := [a.row() for a in self.announced(modality, data, budget)]:
                data[field_of(modality)] = rows
        return data

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, Any]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))  # type: ignore[misc]
        for modality in MODALITIES:
            if field_of(modality) in hf_inputs:
                fields[field_of(modality)] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        return [
            replace(update, replacement=functools.partial(self._shortened, update, out_mm_kwargs))
            for update in updates
        ]

    def _shortened(self, update: Any, out: Any, index: int) -> Any:
        """The placeholders of one image or video: those of the kept tokens."""
        full, field = update.replacement(index), out[update.modality][index].get(field_of(update.modality))
        if field is None:  # it came as embeddings
            if uses_mrope(self.info.get_hf_config()):
                raise ValueError(
                    f"vtoken does not know the positions of {update.modality} embeddings under multimodal"
                    " rope: pass pixels, or serve the model without vtoken."
                )
            return full
        return self.shorten(update.modality, full, Announced.of(field.data))

    def shorten(self, modality: str, full: Any, announced: Announced) -> Shortened:
        """The replacement that the unpatched model gets, with the announced number of placeholders.

        Raises:
            ValueError: if vLLM and transformers disagree about the size of this image or video.
        """
        if not isinstance(full, PromptUpdateDetails):
            full = PromptUpdateDetails.from_seq(full)
        ids = full.full
        marked = torch.ones(len(ids), dtype=torch.bool) if full.is_embed is None else full.is_embed(ids)
        if int(marked.sum()) != announced.tokens:
            raise ValueError(
                f"vLLM makes {int(marked.sum())} tokens of this {modality}, transformers makes"
                f" {announced.tokens}: vtoken does not know this size, send another one."
            )
        left, at = [], 0
        for (first, last), (kept, _) in zip(runs_of(marked), announced.runs(), strict=True):
            left += ids[at : first + kept]
            at = last
        return Shortened(left + ids[at:], full.is_embed, dropped=announced.extent - announced.kept)
