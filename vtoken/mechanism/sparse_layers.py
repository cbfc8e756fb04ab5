"""Hooks on the LLM's attention: in a prompt's forward each layer attends to tokens of its own choice.

A pre-hook on a layer's attention gathers the chosen tokens of its input, so that queries, keys and values
are made of these alone and the KV cache stores these alone; a hook after it puts the result back among the
others, whose attention is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import Hook
from ..kernels import attention_rows
from ..selection import Selection
from ..sparse_attention import AttentionTokens
from .attention_rows import heads, rotate
from .cache_alignment import cut_layers
from .cache_crop import settle
from .drop_schedule import DropSchedule
from .forward_context import Attended, ForwardContext, Run
from .layer_views import LayerViews
from .logical_cache import slots_in
from .masks import choice_mask
from .mixed_precision import MixedLayer
from .ragged import expand_batch, right_aligned, take, tokenwise
from .recurrent_states import counting_layers
from .transformers_names import cache_argument, cache_in, changed


class SparseLayers:
    """The hooks of layers with sparse attention.

    Args:
        decoder: the language model.
        schedule: its drops, with `sparse`.
        attend: `attend(AttentionTokens) -> Selection` of the tokens that a layer attends to.
        context: shared with the other hooks.
        views: makes the strategy's views.
    """

    def __init__(
        self,
        decoder: Any,
        schedule: DropSchedule,
        attend: Callable[[AttentionTokens], Selection],
        context: ForwardContext,
        views: LayerViews,
    ) -> None:
        self.decoder, self.schedule, self.attend, self.context = decoder, schedule, attend, context
        self.views = views

    def hooks(self, i: int, attention: nn.Module) -> list[Hook]:
        """The hooks of layer i; they follow those that read the layer's input."""
        before = functools.partial(self._before, i)
        return [
            Hook(attention, before, before=True, kwargs=True),
            Hook(attention, functools.partial(self._after, i)),
        ]

    def _before(self, i: int, module: Any, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        run = self.context.run
        if run is None or kwargs is None:
            return None
        if run.visual is None:
            if run.reviews:
                hidden = args[0] if args else kwargs["hidden_states"]
                run.memo["newest", i] = module, hidden, kwargs["position_embeddings"]
            return None
        return self._gather(run, i, module, args, kwargs)

    @torch.compiler.disable
    def _gather(self, run: Run, i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The arguments of attention for the chosen tokens; None if all are."""
        if len(args) > 1 or "position_embeddings" not in kwargs:
            raise changed(
                f"{type(module).__name__} is not called with hidden_states and position_embeddings="
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        index, valid = run.now[self.schedule.reads(i)]
        keep, answer, probes = self._choose(run, i, module, hidden, kwargs)
        if torch.equal(keep, valid):
            run.attended[i] = Attended((index, valid), None, probes)
            return None
        rows, there = right_aligned(keep)
        run.attended[i] = Attended((index.gather(1, rows), there), rows, probes)
        out = kwargs | {name: take(x, rows) for name, x in tokenwise(kwargs, *index.shape).items()}
        out["position_embeddings"] = tuple(
            take(t.expand(len(rows), *t.shape[1:]), rows) for t in kwargs["position_embeddings"]
        )
        if isinstance(positions := kwargs.get("position_ids"), Tensor):
            out["position_ids"] = take(expand_batch(positions, len(rows)), rows, dim=-1)
        whole = not self.schedule.evicts and bool(answer.any())
        hides = (valid & ~keep, ~answer.gather(1, rows)) if whole else None
        slots, reads_cache = run.ledger.slots[self.schedule.stores(i)], self.schedule.evicts or whole
        static = run.cache.layers[i].max_cache_len if run.static and reads_cache else 0
        given = kwargs.get("attention_mask"), (rows, there), self._kind(hidden), hides, static
        out["attention_mask"] = choice_mask(slots, *given)
        if not self.schedule.evicts:
            out |= self._whole_cache(run, i, module, hidden, kwargs, whole)
        out["hidden_states"] = take(hidden, rows)
        return (), out

    def _kind(self, hidden: Tensor) -> tuple[str, torch.dtype]:
        """How attention takes masks: "flash", "both ways" or "causal", and the dtype."""
        if "flash" in (self.decoder.config._attn_implementation or ""):
            return "flash", hidden.dtype
        causal = getattr(self.decoder.layers[0].self_attn, "is_causal", True) is not False
        return "causal" if causal else "both ways", hidden.dtype

    def _choose(
        self, run: Run, i: int, attention: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """(B, n) bool, the tokens that the layer attends to, and those of the answer; probes per row."""
        assert run.index is not None and run.visual is not None and run.queries is not None
        index, valid = run.now[self.schedule.reads(i)]
        places = run.index.gather(1, index)
        answer = valid & (places > run.queries[:, None])
        keep, probes = valid.clone(), [0] * len(valid)
        for b in range(0 if self.context.disabled else len(valid)):
            rows = (valid[b] & ~answer[b]).nonzero()[:, 0]
            if not bool(run.visual[b, places[b, rows]].any()):
                continue  # a prompt without pictures is read as without a patch
            tokens, asked = self.views.attention_of(run, b, rows, i, attention, hidden, kwargs)
            with torch.no_grad():
                chosen = self.attend(tokens).check(len(rows)).keep
            gone = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            gone[chosen.to(rows.device)] = False
            gone[-1] = False  # the answer is read from it
            keep[b, rows[gone]] = False
            probes[b] = sum(asked)
        return keep, answer, probes

    def _whole_cache(
        self, run: Run, i: int, module: Any, hidden: Tensor, kwargs: dict[str, Any], whole: bool
    ) -> dict[str, Any]:
        """The argument of the attention with a stand-in for the KV cache, which stores all tokens."""
        cache = cache_in(kwargs)
        name = next((k for k, v in kwargs.items() if v is cache and v is not None), "")
        key = rotate(heads(module, hidden, "k"), *kwargs["position_embeddings"])
        past = run.ledger.slots[self.schedule.stores(i)].shape[1]
        stand_in = StoresAll(cache, key, heads(module, hidden, "v"), past, whole)
        return {name or cache_argument(type(module).forward): stand_in}

    def _after(self, i: int, module: nn.Module, args: Any, out: Any) -> Any:
        run = self.context.run
        if run is None or run.visual is None:
            return None
        self.pack(run, i)
        return self._spread(run, i, out)

    @torch.compiler.disable
    def pack(self, run: Run, i: int) -> None:
        """Tell a layer of mixed precision which of the prompt's tokens, that it stores, are important."""
        layer = None if run.cache is None else run.cache.layers[i]
        if not isinstance(layer, MixedLayer):
            return
        valid, attended = run.now[self.schedule.reads(i)][1], run.attended[i]
        important = valid
        if attended.rows is not None:
            there = attended.now[1]
            important = (
                torch.zeros_like(valid, dtype=torch.long).scatter_add(1, attended.rows, there.long()) > 0
            )
        layer.pack(important, valid)

    @torch.compiler.disable
    def _spread(self, run: Run, i: int, out: Any) -> Any:
        """The output of attention, zero for tokens that were not chosen; None if all were."""
        attended = run.attended.get(i)
        if attended is None or attended.rows is None:
            return None
        made = out[0] if isinstance(out, tuple) else out
        rows, there = attended.rows.to(made.device)[..., None], attended.now[1].to(made.device)[..., None]
        n = run.now[self.schedule.reads(i)][0].shape[1]
        spread = made.new_zeros(len(made), n, made.shape[-1])
        # filler points anywhere and adds nothing
        spread = spread.scatter_add(1, rows.expand_as(made), made.masked_fill(~there, 0))
        return (spread, *out[1:]) if isinstance(out, tuple) else spread

    # -- tokens after the prompt ----------------------------------------------------------------------------
    def due(self, run: Run) -> bool:
        """Whether tokens after the prompt are chosen among when this forward, without pictures, ends.

        Static caches keep them all, as nothing would be saved, and so do answers with drafts, which may be
        taken back.
        """
        sparse = self.schedule.sparse
        if sparse is None or not sparse.interval or run.query_length > 1 or run.static:
            return False
        if self.context.prompt is not None and self.context.prompt.drafts:
            return False
        return bool(run.cache.get_seq_length() + 1 - run.ledger.end >= sparse.interval)

    def after_text(self, run: Run) -> None:
        """Choose among the tokens of an answer; tokens of a text turn stay in any case."""
        if run.reviews:
            self.review(run)
        elif self.schedule.sparse is not None and self.schedule.sparse.interval and run.query_length > 1:
            self._take_in(run)

    @torch.compiler.disable
    def _take_in(self, run: Run) -> None:
        """Enter all tokens that were read into the tables, but for those that the mask hides."""
        prompt = self.context.prompt
        if run.static or (prompt is not None and prompt.drafts):
            return
        run.ledger.follow(slots_in(run.cache), grow=True, seen=run.seen)
        for layer in counting_layers(run.cache):
            settle(layer, run.ledger)

    @torch.compiler.disable
    @torch.no_grad()
    def review(self, run: Run) -> None:
        """Choose anew among the tokens since the last choice; every layer's cache loses the others, or packs
        them in fewer bits.
        """
        ledger, sparse = run.ledger, self.schedule.sparse
        assert sparse is not None and sparse.retain is not None
        end = ledger.end
        ledger.follow(slots_in(run.cache), grow=True, seen=run.seen)
        latest = ledger.end - end
        pictured = [True] * ledger.batch_size if ledger.pictured is None else ledger.pictured.tolist()
        for i in range(self.schedule.layers):
            layer, table = run.cache.layers[i], self.schedule.stores(i)
            mixed, real = isinstance(layer, MixedLayer), ledger.slots[table] >= 0
            rows = self._newest_rows(run, i, layer.read_keys() if mixed else layer.keys, real)
            keep = real.clone()
            for b, row in enumerate(rows[..., -latest:]):
                if not pictured[b]:
                    continue
                chosen = sparse.retain(row).check(latest).keep
                gone = torch.ones(latest, dtype=torch.bool, device=keep.device)
                gone[chosen.to(keep.device)] = False
                gone[-1] = False
                keep[b, -latest:] &= ~gone
            if mixed:
                waiting = layer.keys.shape[2]
                layer.pack(keep[:, -waiting:], real[:, -waiting:])
                continue
            index, valid = right_aligned(keep, least=0)
            cut_layers([layer], index.to(layer.keys.device))
            ledger.lose(table, index, valid)
        for layer in counting_layers(run.cache):
            settle(layer, ledger)

    def _newest_rows(self, run: Run, i: int, keys: Tensor, seen: Tensor) -> Tensor:
        """(B, heads, slots) float32: the newest token's attention to what the cache of layer i holds."""
        attention, hidden, (cos, sin) = run.memo["newest", i]
        query = rotate(heads(attention, hidden, "q"), cos, sin)
        return attention_rows(query, keys, attention.scaling, seen[:, None].to(keys.device))[:, :, 0]


class StoresAll:
    """Stands in for the KV cache of a layer: stores all tokens and gives attention those chosen.

    Args:
        cache: the KV cache, None if there is none.
        key, value: (B, kv_heads, n, head_dim) of all tokens.
        past: tokens that the layer has stored before.
        whole: whether attention is given all tokens, as an answer in the same forward reads them.
    """

    def __init__(self, cache: Any, key: Tensor, value: Tensor, past: int, whole: bool) -> None:
        self.cache, self.key, self.value, self.past, self.whole = cache, key, value, past, whole

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention reads, given the keys and values of the chosen tokens."""
        stored = self.key, self.value
        if self.cache is not None:
            stored = self.cache.update(self.key, self.value, *args, **kwargs)
        if self.whole:
            return stored
        pairs = zip(stored, (key, value), strict=True)
        keys, values = (torch.cat([a[:, :, : self.past], b], 2) if self.past else b for a, b in pairs)
        return keys, values
