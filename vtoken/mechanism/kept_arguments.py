"""The arguments of the language model for the tokens that a strategy kept."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .forward_context import Plan, Run
from .layer_masks import LayerMasks
from .ledger import Ledger
from .masks import both_ways, cut_mask
from .packed_rows import packed_lengths, packed_mask, ranks_of
from .ragged import USUAL, check_cut, expand_batch, overwrite, right_aligned, take, take_merged
from .recurrent_states import check_filler, has_length
from .transformers_names import FOR_LAYERS, mask_for_kind


@dataclass
class Turn:
    """State of a forward with visual tokens while they are chosen.

    Attributes:
        ledger: of the cache, or a new one.
        fresh: whether the ledger is new.
        past: tokens in the cache, as the prompt counts them.
        mask: the language model's attention mask.
        mask_2d: (B, past + q) that mask, if it has two dimensions.
        real: (B, q) bool, tokens that are not padding.
    """

    ledger: Ledger
    fresh: bool
    past: int
    mask: Any
    mask_2d: Tensor | None
    real: Tensor


class KeptArguments:
    """Gathers what the language model reads: embeddings, positions, masks and features of single layers.

    Args:
        decoder: the language model.
        masks: those of its layers.
        renumber: whether positions are counted without the dropped tokens.
        in_layers: whether the layers add the features, to visual tokens that are zero before.
    """

    def __init__(self, decoder: Any, masks: LayerMasks, renumber: bool, in_layers: bool) -> None:
        self.decoder, self.masks, self.renumber, self.in_layers = decoder, masks, renumber, in_layers
        self.arguments = set(inspect.signature(decoder.forward).parameters)

    def of(self, turn: Turn, run: Run, plan: Plan | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments `kwargs` (B, q, ...) for the kept tokens (B, n, ...); `run` notes which they are."""
        real, embeds = turn.real, kwargs["inputs_embeds"]
        uncut = self.arguments - {*USUAL, *run.tokenwise}
        check_cut({n: x for n, x in kwargs.items() if n in uncut}, *real.shape)
        # padding goes: rows are aligned to the right again
        keep = real if plan is None else (plan.keep.to(embeds.device) | ~run.visual) & real  # type: ignore[operator]
        index, valid = right_aligned(keep)
        run.index, run.ragged = index, [not bool(valid.all())]
        if run.ragged[0]:
            check_filler(run.ledger, valid)
        run.now = [(torch.arange(index.shape[1], device=embeds.device).expand(len(embeds), -1), valid)]
        merged = () if plan is None else (plan.into, plan.weight)
        kwargs["inputs_embeds"] = take_merged(embeds, index, valid, *merged)
        if plan is not None and plan.source is not None and plan.features is not None and not self.in_layers:
            kwargs["inputs_embeds"] = overwrite(
                kwargs["inputs_embeds"], plan.source.gather(1, index), plan.features
            )
        kwargs["position_ids"] = run.positions = self._positions(
            kwargs.get("position_ids"), run, keep, real, index
        )
        if run.first is not None:
            run.ranks = ranks_of(run.first, index, valid)
        kwargs = packed_lengths(kwargs, run.ranks)
        kwargs["attention_mask"] = self._mask(turn, run, kwargs["inputs_embeds"])
        self._for_layers(kwargs, run, plan)
        return kwargs | {name: take(x, index) for name, x in run.tokenwise.items()}

    def _positions(
        self, positions: Tensor | None, run: Run, keep: Tensor, real: Tensor, index: Tensor
    ) -> Tensor:
        """Position ids that the language model would have chosen, of the kept tokens."""
        ledger = run.ledger
        batch, length = keep.shape
        if positions is None:
            positions = (torch.arange(length, device=keep.device) + ledger.end).expand(batch, length)
        positions = expand_batch(positions.to(keep.device), batch)
        if self.renumber:
            gone = (~keep & real).long()
            lost = gone.cumsum(1)
            if run.first is not None:  # every packed prompt counts its own
                lost = lost - (lost - gone).gather(1, run.first)
            positions = positions - lost - ledger.shift[0][:, None]
            ledger.shift = [shift + lost[:, -1] for shift in ledger.shift]
        return take(positions - ledger.origin, index, dim=-1)

    def _mask(self, turn: Turn, run: Run, embeds: Tensor) -> Any:
        """The attention mask of the kept tokens (B, n, d)."""
        assert run.index is not None
        mask, mask_2d, valid, ledger = turn.mask, turn.mask_2d, run.now[0][1], run.ledger
        if run.ranks is not None and mask is None:
            return None if self.masks.flash else packed_mask(self.decoder.config, embeds, run.ranks)
        if isinstance(mask, dict):
            return {kind: self._mask_of_kind(kind, m, run, embeds) for kind, m in mask.items()}
        if mask is not None and mask_2d is None:
            return cut_mask(mask, run, 0, (run.index, valid), run.query_length)
        if mask_2d is not None:
            return torch.cat(
                [mask_2d[:, : ledger.end].bool(), valid & turn.real.gather(1, run.index)], 1
            ).long()
        if run.ragged[0] or ledger.needs_mask or run.cache is None:
            # without a cache and a 2-D mask, gaps in position_ids would be read as packed sequences
            return self._made(ledger.validity(0, valid), valid)
        return None

    def _made(self, keys: Tensor, valid: Tensor) -> Tensor:
        """A mask in place of none, from (B, k) bool."""
        return both_ways(keys, valid.shape[1]) if self.masks.both_ways else keys.long()

    def _mask_of_kind(self, kind: str, mask: Any, run: Run, embeds: Tensor) -> Any:
        """The mask of one kind of layer, of several that were made before the language model."""
        valid, ledger = run.now[0][1], run.ledger
        unmade = mask is None and (run.ragged[0] or ledger.needs_mask)
        if unmade and self.masks.both_ways:
            return self._made(ledger.validity(0, valid), valid)
        # chunks were counted over the whole prompt; a model with chunks makes no masks of its own
        if ledger.chunked or unmade:
            return mask_for_kind(
                kind, self.decoder.config, embeds, ledger.validity(0, valid).long(), run.cache
            )
        static, kinds = None, self.masks.kind
        if run.static and kind in kinds and has_length(layer := run.cache.layers[kinds.index(kind)]):
            # windows shorter than the prompt give it all
            static = int(layer.get_mask_sizes(embeds.shape[1])[0])
        return cut_mask(mask, run, 0, (run.index, valid), run.query_length, static)  # type: ignore[arg-type]

    def _for_layers(self, kwargs: dict[str, Any], run: Run, plan: Plan | None) -> None:
        """Features that some layers add: one row per visual token and layer, in (sample, position) order."""
        name = next((name for name in FOR_LAYERS if kwargs.get(name) is not None), None)
        if name is None or run.index is None:
            return
        marks, valid = kwargs[name], run.now[0][1]
        places = marks if marks.ndim == 2 else marks[..., 0]
        now = places.gather(1, run.index) & valid
        kwargs[name] = now if marks.ndim == 2 else now[..., None]
        row = (places.flatten().long().cumsum(0) - 1).view(places.shape).gather(1, run.index)[now]
        given = kwargs[FOR_LAYERS[name]]
        planes = list(given.values()) if isinstance(given, dict) else list(given)
        if self.in_layers and plan is not None and (plan.into is not None or plan.features is not None):
            planes = self._changed(planes, places, run, plan, now)
        else:
            planes = [e[row.to(e.device)] for e in planes]
        kwargs[FOR_LAYERS[name]] = (
            dict(zip(given, planes, strict=True)) if isinstance(given, dict) else planes
        )

    @staticmethod
    def _changed(planes: list[Tensor], places: Tensor, run: Run, plan: Plan, now: Tensor) -> list[Tensor]:
        """The features of each layer, merged or written as a strategy did to those of all side by side."""
        assert run.index is not None
        out, first = [], 0
        for plane in planes:
            width = plane.shape[-1]
            rows = plane.new_zeros(*places.shape, width).masked_scatter(places[..., None], plane)
            rows = take_merged(rows, run.index, run.now[0][1], plan.into, plan.weight)
            if plan.source is not None and plan.features is not None:
                written = plan.features[:, first : first + width]
                rows = overwrite(rows, plan.source.gather(1, run.index), written)
            out.append(rows[now])
            first += width
        return out
