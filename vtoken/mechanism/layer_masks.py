"""The attention masks of the LLM's layers, which hold different tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from .drop_schedule import DropSchedule
from .forward_context import ForwardContext, Run
from .hidden_pictures import hidden_now, hide
from .masks import both_ways, cut_mask
from .transformers_names import cache_argument


class LayerMasks:
    """Cuts the mask that the language model made, or makes one where rows differ in length.

    Args:
        decoder: the language model.
        schedule: the drops.
        context: shared with the hooks.
    """

    def __init__(self, decoder: Any, schedule: DropSchedule, context: ForwardContext) -> None:
        self.decoder, self.schedule, self.context = decoder, schedule, context
        kinds = getattr(decoder.config, "layer_types", None)
        self.kind = list(kinds[: schedule.layers]) if kinds else [None] * schedule.layers

    @property
    def flash(self) -> bool:
        return "flash" in (self.decoder.config._attn_implementation or "")

    @property
    def both_ways(self) -> bool:
        """Whether attention without a mask is in both directions, and masks are tensors of its pattern."""
        layer = next(iter(getattr(self.decoder, "layers", ())), None)
        return not self.flash and getattr(getattr(layer, "self_attn", None), "is_causal", True) is False

    def of(self, run: Run, i: int, mask: Any, hidden: Tensor) -> Any:
        """The mask of layer i for its tokens (B, m, d) from that of stage 0, made once per stage and kind."""
        # not id(mask): torch.compile would guard on the object
        key = "mask", self.schedule.reads(i), self.schedule.stores(i), self.kind[i]
        if key not in run.memo:
            made = self._make(run, i, mask, hidden)
            if self.schedule.hides and run.layout is not None and not self.context.disabled:
                made = self._without_pictures(run, i, made)
            run.memo[key] = self._evicted(run, i, made) if self.evicts(run, i) else made
        return run.memo[key]

    def _without_pictures(self, run: Run, i: int, mask: Any) -> Tensor:
        """A mask of stage 0 in which tokens after a picture see only its marked tokens."""
        if self.flash:
            raise NotImplementedError(
                "Flash attention cannot hide a picture from what follows it: load the model with"
                " attn_implementation='sdpa'."
            )
        hidden, past = hidden_now(run), run.ledger.slots[self.schedule.stores(i)].shape[1]
        # static keys have the length of the cache
        keys = run.cache.layers[i].max_cache_len if run.static else past + hidden.shape[1]
        return hide(mask, hidden, past, keys)

    def evicts(self, run: Run, i: int) -> bool:
        """Whether a mask must hide dropped tokens from generated ones here, as there is no cache to cut."""
        return i in self.schedule.aligned and run.choice is not None and run.choice.survivors is not None

    def _evicted(self, run: Run, i: int, mask: Any) -> Tensor:
        assert run.index is not None
        if self.flash:
            raise NotImplementedError(
                "Flash attention without a KV cache cannot hide from the answer what an aligned cache loses:"
                " leave out use_cache=False, or pass align_cache=False."
            )
        survivors = run.choice.survivors
        place = run.index.gather(1, run.now[self.schedule.reads(i)][0])
        answer = place >= survivors.shape[1]
        lost = ~answer & ~survivors.gather(1, place.clamp(max=survivors.shape[1] - 1))
        hidden = (answer[:, :, None] & lost[:, None])[:, None]
        if mask is None:
            mask = torch.ones(hidden.shape[-2:], dtype=torch.bool, device=hidden.device).tril()
        off = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return torch.where(
            hidden.to(mask.device), torch.tensor(off, dtype=mask.dtype, device=mask.device), mask
        )

    def _make(self, run: Run, i: int, mask: Any, hidden: Tensor) -> Any:
        ledger, stage, table = run.ledger, self.schedule.reads(i), self.schedule.stores(i)
        now = run.now[stage] if run.visual is not None else None
        if mask is not None:
            return cut_mask(
                mask, run, table, now, run.query_length if run.index is None else run.index.shape[1]
            )
        if not (ledger.ragged[table] or (run.visual is not None and run.ragged[stage])):
            return None
        # this drop left rows of different lengths, so filler must be masked although the model passed no mask
        if now is None:
            tail = run.cache.get_seq_length() - ledger.end + run.query_length
            valid = torch.ones(hidden.shape[0], tail, dtype=torch.bool, device=hidden.device)
        else:
            valid = now[1]
        if self.both_ways:
            return both_ways(ledger.validity(table, valid), hidden.shape[1])
        layer = run.cache.layers[i] if run.cache is not None else None
        saved = getattr(layer, "after_stage", None)
        if layer is not None:
            layer.after_stage = None  # the sizes of this layer itself
        try:
            return create_causal_mask(
                config=self.decoder.config,
                inputs_embeds=hidden,
                attention_mask=ledger.validity(table, valid),
                **{cache_argument(create_causal_mask): run.cache},
                layer_idx=i if run.cache is not None else None,
            )
        finally:
            if layer is not None:
                layer.after_stage = saved
