"""Views for strategies of one prompt's tokens before an LLM layer that drops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sparse_attention import AttentionTokens
from ..tokens import PrefillTokens
from .attention_rows import heads, rotate, rows_of_attention
from .cache_crop import name_of
from .drop_schedule import DropSchedule
from .forward_context import Run
from .masks import cut_mask


class LayerViews:
    """Makes the `PrefillTokens` of one language model.

    Args:
        decoder: the language model.
        schedule: its drops.
    """

    def __init__(self, decoder: Any, schedule: DropSchedule) -> None:
        self.decoder, self.schedule = decoder, schedule

    def of(
        self,
        run: Run,
        stage: int,
        b: int,
        rows: Tensor,
        places: Tensor,
        hidden: Tensor,
        ahead: tuple[Any, Any, Any],
        candidates: Tensor,
    ) -> PrefillTokens:
        """The strategy's view of sample b: `rows` of the current tokens, at `places` of the prompt's forward.

        `ahead` is the next layer, its rotary tables and its mask (of stage 0); `candidates` is (q,) bool.
        """
        assert run.layout is not None and run.ends is not None and run.queries is not None
        k = self.schedule.drops[stage - 1]
        tables = None
        if run.tap is not None:
            cos, sin = run.tap[3]
            tables = tuple(t.expand(hidden.shape[0], *t.shape[1:])[b, rows] for t in (cos, sin))

        def before(queries: Tensor) -> Tensor:
            i, attention, inputs, rotary, mask = _layer_before(run, "attention")
            return self._rows(run, b, rows, queries, i, attention, inputs, rotary, mask, stored=True)

        def keys() -> Tensor:
            i, attention, inputs, rotary, _ = _layer_before(run, "keys")
            return self._keys(run, b, rows, i, attention, inputs, rotary)

        def preview(queries: Tensor) -> Tensor:
            layer, rotary, mask = ahead
            if mask is not None and (stage > 1 or run.past_slots):
                assert run.index is not None
                mask = cut_mask(mask, run, self.schedule.stores(k), run.now[stage - 1], run.index.shape[1])
            inputs = layer.input_layernorm(hidden[b : b + 1])
            return self._rows(run, b, rows, queries, k, layer.self_attn, inputs, rotary, mask, stored=False)

        mine = hidden[b] if len(rows) == hidden.shape[1] else hidden[b, rows]
        return PrefillTokens(
            layer=k,
            hidden_states=mine,
            visual=candidates[places],
            positions=places,
            total_visual=int(candidates.sum()),
            attention_rows=before,
            preview_rows=preview,
            keys=keys,
            normed=lambda: self.decoder.norm(mine),
            end=int((places < run.ends[b]).sum()),
            query=int((places < run.queries[b]).sum()),
            num_layers=len(self.decoder.layers),
            units=run.layout.units[b],
            item=torch.where(candidates, run.layout.item[b], -1)[places],
            separator=run.layout.separator[b, places],
            marked=run.layout.marked[b, places],
            rotary=tables,  # type: ignore[arg-type]
            memory=run.memory.setdefault(b, {}),
        )

    def attention_of(
        self, run: Run, b: int, rows: Tensor, i: int, attention: Any, hidden: Tensor, given: dict[str, Any]
    ) -> tuple[AttentionTokens, list[int]]:
        """The strategy's view of sample b for the attention of layer i; queries asked for so far, by call.

        Args:
            rows: the prompt's tokens among those that the layer reads.
            attention, hidden, given: the self-attention module, its input and its keyword arguments.
        """
        assert run.layout is not None and run.visual is not None and run.index is not None
        places = run.index.gather(1, run.now[self.schedule.reads(i)][0])[b, rows]
        rotary, mask = given["position_embeddings"], given.get("attention_mask")
        asked: list[int] = []

        def attention_rows(queries: Tensor) -> Tensor:
            asked.append(len(queries))
            return self._rows(run, b, rows, queries, i, attention, hidden, rotary, mask, stored=False)

        units = run.layout.units[b]
        return AttentionTokens(i, run.visual[b, places], places, attention_rows, units), asked

    def _rows(
        self,
        run: Run,
        b: int,
        rows: Tensor,
        queries: Tensor,
        i: int,
        attention: Any,
        hidden: Tensor,
        rotary: Any,
        mask: Any,
        stored: bool,
    ) -> Tensor:
        """Attention rows of layer i for sample b; with `stored`, keys come from the cache."""
        own, tables = self._inputs(b, rows, hidden, rotary)
        key, past = self._cached(run, b, rows, i, len(rows) == hidden.shape[1], stored)
        seen = None
        # images or prompts with attention in both directions
        if isinstance(mask, Tensor) and mask.ndim == 4:
            seen = mask[min(b, len(mask) - 1), 0].index_select(0, rows[queries])
            width = run.ledger.slots[self.schedule.stores(i)].shape[1]
            seen = seen.index_select(1, width + rows)
            seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        return rows_of_attention(attention, own, tables, queries, key, past, seen)

    def _keys(
        self, run: Run, b: int, rows: Tensor, i: int, attention: Any, hidden: Tensor, rotary: Any
    ) -> Tensor:
        """Keys of layer i for sample b, (n, kv_heads * head_dim)."""
        key, _ = self._cached(run, b, rows, i, len(rows) == hidden.shape[1], stored=True)
        if key is None:
            own, tables = self._inputs(b, rows, hidden, rotary)
            key = rotate(heads(attention, own, "k"), *tables)
        return key[0].transpose(0, 1).flatten(1)

    @staticmethod
    def _inputs(b: int, rows: Tensor, hidden: Tensor, rotary: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A layer's input (1, n, d) and rotary tables (1, n, rotary_dim) for sample b."""
        one = 0 if hidden.shape[0] == 1 else b
        cos, sin = (t.expand(max(b + 1, t.shape[0]), *t.shape[1:])[b : b + 1, rows] for t in rotary)
        own = hidden[one : one + 1]
        return (own if len(rows) == hidden.shape[1] else own[:, rows]), (cos, sin)

    def _cached(
        self, run: Run, b: int, rows: Tensor, i: int, unpadded: bool, stored: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Keys in the cache of layer i: this forward's, and those of earlier ones; None where none are."""
        key = past = None
        cached = run.cache.layers[i] if run.cache is not None else None
        width = run.ledger.slots[self.schedule.stores(i)].shape[1]
        keys = None
        if cached is not None and cached.is_initialized and not getattr(run.cache, "offloading", False):
            if hasattr(cached, "read_keys"):
                keys = cached.read_keys()
            elif not hasattr(cached, "_quantize"):
                keys = cached.keys
        # the cache lacks tokens of this forward, or holds them as codes
        stored = stored and not (self.schedule.evicts or hasattr(cached, "read_keys"))
        needed = width + (run.now[self.schedule.reads(i)][0].shape[1] if stored else 0)
        if keys is not None and keys.ndim == 4 and keys.shape[2] >= needed:
            if stored:  # a view if there is no padding to leave out
                key = (
                    keys[b : b + 1, :, width:needed]
                    if unpadded
                    else keys[b : b + 1].index_select(2, width + rows)
                )
            if width:
                seen = run.ledger.slots[self.schedule.stores(i)][b] >= 0
                if run.past_seen is not None:
                    seen = seen & run.past_seen[b, run.ledger.columns[self.schedule.stores(i)][b]]
                past = keys[b : b + 1].index_select(2, seen.nonzero()[:, 0])
        elif width:
            raise NotImplementedError(
                f"A new image on a cache of {name_of(cached)} that holds earlier turns cannot be scored"
                " inside the LLM: use a DynamicCache or StaticCache that is not offloaded."
            )
        return key, past


def _layer_before(run: Run, what: str) -> Any:
    """Number, attention, input, rotary tables and mask of the layer before; ValueError before layer 0."""
    if run.tap is None:
        raise ValueError(
            f"There is no layer before layer 0 whose {what} could be read: choose a later layer."
        )
    return run.tap
