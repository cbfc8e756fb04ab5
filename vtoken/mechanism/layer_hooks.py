"""Hooks on the LLM's layers, which drop tokens before a layer and shorten the inputs of all later layers.

The decoder makes one mask per attention type and one (cos, sin), and hands the same objects to every
layer. A pre-hook on the first layer of a stage gathers the hidden states; pre-hooks on all layers after it
replace masks, rotary tables and positions by gathered ones, made once per (stage, layer type).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers.modeling_layers
from torch import Tensor, nn

from ..hooks import Hook, Hooks, rebuilt
from ..selection import Selection
from ..sparse_attention import AttentionTokens
from ..tokens import PrefillTokens
from .cache_alignment import align_cache
from .cache_crop import settle
from .drop_schedule import DropSchedule
from .forward_context import ForwardContext, Plan, Run
from .hidden_pictures import adapted
from .layer_masks import LayerMasks
from .layer_views import LayerViews
from .ledger import Ledger
from .masks import WINDOW_FULL
from .ragged import expand_batch, right_aligned, take, take_merged, tokenwise
from .recurrent_states import SPOILED, counting_layers
from .sparse_layers import SparseLayers
from .stored_cache import announce
from .transformers_names import changed, check_length, recomputes

# Older releases checkpoint `__call__`: hooks run again in backward, after the state of the forward is gone.
HOOKS_INSIDE_CHECKPOINT = "__call__" in vars(transformers.modeling_layers.GradientCheckpointingLayer)


class LayerHooks:
    """The hooks on decoder layers.

    Args:
        decoder: the language model.
        schedule: the drops.
        select: `select(PrefillTokens) -> Selection` over the visual tokens of a prompt, called at every drop.
        context: shared with the other hooks.
        positions: "original" or "renumber".
        adapt: `adapt(layer, hidden (m, d)) -> (m, d)` of the marked tokens, if pictures are hidden.
        attend: `attend(AttentionTokens) -> Selection` of the tokens that a layer attends to, if it is sparse.
    """

    def __init__(
        self,
        decoder: Any,
        schedule: DropSchedule,
        select: Callable[[PrefillTokens], Selection],
        context: ForwardContext,
        positions: str = "original",
        adapt: Callable[[int, Tensor], Tensor] | None = None,
        attend: Callable[[AttentionTokens], Selection] | None = None,
    ) -> None:
        self.decoder, self.schedule, self.select, self.context = decoder, schedule, select, context
        self.adapt = adapt
        self.renumber = positions == "renumber"
        self.views = LayerViews(decoder, schedule)
        self.sparse = None if attend is None else SparseLayers(decoder, schedule, attend, context, self.views)
        self.chunked = getattr(decoder.config, "attention_chunk_size", None) is not None
        self.masks = LayerMasks(decoder, schedule, context)
        rotary = getattr(decoder, "rotary_emb", None)
        self.typed_rotary = (
            rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters
        )
        self.hooks = Hooks(self.find)

    @property
    def hooks_layers(self) -> bool:
        """Whether the layers carry hooks."""
        return self.schedule.inside or self.masks.flash

    def find(self) -> list[Hook]:
        """The hooks, on the layers that the decoder has now."""
        layers, hooks = list(getattr(self.decoder, "layers", ())), []
        if len(layers) != self.schedule.layers:
            raise rebuilt(f"The LLM has {len(layers)} layers where it had {self.schedule.layers}")
        for i, layer in enumerate(layers):
            if self.schedule.stores(i) or self.masks.flash:
                hooks.append(Hook(layer, functools.partial(self._before_layer, i), before=True, kwargs=True))
            if i + 1 in self.schedule.drops:
                if not hasattr(layer, "self_attn"):
                    raise rebuilt(f"Layer {i} of the LLM has no self_attn, whose attention is read")
                hooks.append(Hook(layer.self_attn, functools.partial(self._tap, i), before=True, kwargs=True))
            if self.sparse is not None:
                hooks += self.sparse.hooks(i, layer.self_attn)
        return hooks

    # -- refusals --------------------------------------------------------------------------------------------
    def check_training(self) -> None:
        if self.sparse is not None and recomputes(self.decoder):
            raise NotImplementedError(
                "Attention among chosen tokens cannot be computed again in backward: train without gradient"
                " checkpointing, or prune before the LLM."
            )
        if self.schedule.count and HOOKS_INSIDE_CHECKPOINT and recomputes(self.decoder):
            raise NotImplementedError(
                "Dropping inside the LLM under gradient checkpointing needs a newer transformers, found "
                f"{transformers.__version__}: upgrade it or prune before the LLM."
            )

    def check_windows(self, tokens: int) -> None:
        """Raise before the first token if a prompt, with its answer, is longer than a sliding window."""
        window = getattr(self.decoder.config, "sliding_window", None)
        slides = "sliding_attention" in self.masks.kind if any(self.masks.kind) else True
        if window is not None and slides and tokens > window:
            raise NotImplementedError(
                f"{WINDOW_FULL[:-1]} (window {window}, prompt and answer {tokens} tokens)."
            )

    def check_ledger(self, ledger: Ledger) -> None:
        """Raise ValueError for a cache that was filled under a patch with other layers or positions, or by a
        model without a patch.
        """
        if ledger.spoiled:
            raise ValueError(SPOILED)
        if ledger.renumber != self.renumber:
            found, own = ("renumber", "original") if ledger.renumber else ("original", "renumber")
            raise ValueError(
                f"This KV cache was filled with positions={found!r}, the present strategy has"
                f" positions={own!r}: go on with the strategy that filled it, or start the conversation with"
                " a new cache."
            )
        if len(ledger.slots) != self.schedule.tables or ledger.tables != self.schedule.stored:
            raise ValueError(
                "This KV cache was filled under a strategy that drops at other LLM layers than the present"
                " one: go on with the strategy that filled it, or start the conversation with a new cache."
            )

    # -- hooks -----------------------------------------------------------------------------------------------
    def _tap(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        run = self.context.run
        if run is not None and run.visual is not None and kwargs is not None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            run.tap = (i, module, hidden, kwargs["position_embeddings"], kwargs.get("attention_mask"))

    def _before_layer(self, i: int, layer: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        run = self.context.run
        if run is None or kwargs is None:
            return None
        if not self.schedule.inside and (run.ledger.states or "position_embeddings" not in kwargs):
            # flash attention alone needs the hook
            return None if run.visual is None else (args, kwargs | {"position_ids": run.ranks})
        if not args or "position_embeddings" not in kwargs:
            raise changed(f"{type(layer).__name__} is not called with hidden states and position_embeddings=")
        stage, table = self.schedule.reads(i), self.schedule.stores(i)
        mask = kwargs.get("attention_mask")
        if run.visual is None:
            if self.renumber and stage:
                kwargs = kwargs | {"position_embeddings": self._rotary(run, i, stage, kwargs, args[0])}
            if mask is not None or run.ledger.ragged[table]:
                kwargs = kwargs | {"attention_mask": self.masks.of(run, i, mask, args[0])}
            return args, kwargs
        if self.masks.flash:
            # rope uses position_embeddings; flash attention would read the gaps as packed sequences
            kwargs = kwargs | {"position_ids": run.ranks}
        hides = self.schedule.hides and run.layout is not None and not self.context.disabled
        if hides and self.adapt is not None:
            args = (adapted(run, i, args[0], self.adapt), *args[1:])
        same = stage == 0 and not run.past_slots and not hides
        if table == 0 or (same and not self.masks.evicts(run, i)):
            return args, kwargs
        if len(run.now) == stage:
            before = self._rotary(run, i, stage - 1, kwargs, args[0])
            args = (self._enter(run, stage, args[0], layer, before, mask), *args[1:])
        kwargs = dict(kwargs)
        if stage:
            kwargs["position_embeddings"] = self._rotary(run, i, stage, kwargs, args[0])
            positions = kwargs.get("position_ids")
            if positions is not None:
                index = run.now[stage][0]
                kwargs["position_ids"] = take(expand_batch(positions, index.shape[0]), index, dim=-1)
            args, kwargs = self._tokenwise(run, stage, args, kwargs)
        kwargs["attention_mask"] = self.masks.of(run, i, mask, args[0])
        return args, kwargs

    @staticmethod
    def _tokenwise(run: Run, stage: int, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A layer's arguments, of whose other rows for the tokens of stage 0 a stage has its own."""
        assert run.index is not None
        index, names = run.now[stage][0], [str(i) for i in range(1, len(args))]
        given = kwargs | dict(zip(names, args[1:], strict=True))
        given |= {name: take(x, index) for name, x in tokenwise(given, *run.index.shape).items()}
        return (args[0], *(given.pop(name) for name in names)), given

    def _rotary(self, run: Run, i: int, stage: int, kwargs: dict[str, Any], hidden: Tensor) -> Any:
        """(cos, sin) of a stage's tokens; `kwargs` are those of layer i, with the tables of stage 0."""
        if stage == 0:
            return kwargs["position_embeddings"]
        key = "rotary", stage, self.masks.kind[i]
        if key not in run.memo:
            if self.renumber:
                typed = (self.masks.kind[i],) if self.typed_rotary else ()
                run.memo[key] = self.decoder.rotary_emb(hidden, self._renumbered(run, stage), *typed)
            else:
                index = run.now[stage][0]
                tables = kwargs["position_embeddings"]
                run.memo[key] = tuple(take(t.expand(index.shape[0], *t.shape[1:]), index) for t in tables)
        return run.memo[key]

    def _renumbered(self, run: Run, stage: int) -> Tensor:
        """Position ids (B, m) of a stage, without gaps."""
        assert run.positions is not None
        shift = (run.ledger.shift[stage] - run.ledger.shift[0])[:, None]
        if run.visual is None:
            return run.positions - shift
        (_, valid), (index, valid_now) = run.now[0], run.now[stage]
        rank = (valid.long().cumsum(1) - 1).gather(1, index) - (valid_now.long().cumsum(1) - 1)
        return (run.positions.expand(valid.shape[0], -1).gather(1, index) - rank - shift).clamp(min=0)

    # -- the drop --------------------------------------------------------------------------------------------
    @torch.compiler.disable
    def _enter(
        self, run: Run, stage: int, hidden: Tensor, layer: nn.Module, rotary: Any, mask: Any
    ) -> Tensor:
        """Ask the strategy and gather what it keeps: (B, n, d) -> (B, m, d)."""
        assert run.visual is not None and run.index is not None
        index, valid = run.now[stage - 1]
        check_length(f"Layer {self.schedule.drops[stage - 1]} was given", hidden.shape[1], index.shape[1])
        prompt_index = run.index.gather(1, index)
        # a hidden query has been read when it is dropped, and must not be seen afterwards either
        candidates = run.visual if self.schedule.hides else run.candidates
        visual = candidates.gather(1, prompt_index) & valid
        plan = Plan(valid.clone())
        for b in range(0 if self.context.disabled else hidden.shape[0]):
            rows = valid[b].nonzero()[:, 0]
            places = rows[visual[b][rows]]
            if not len(places):
                continue
            if (stage, b) not in run.drops:
                ahead = layer, rotary, mask
                tokens = self.views.of(
                    run, stage, b, rows, prompt_index[b, rows], hidden, ahead, candidates[b]
                )
                with torch.no_grad():
                    run.drops[stage, b] = self.select(tokens).check(len(places))
            plan.follow(b, places, run.drops[stage, b])
        if plan.into is None and torch.equal(plan.keep, valid):
            run.now.append(run.now[-1])
            run.ragged.append(run.ragged[-1])
            return hidden
        sub, sub_valid = right_aligned(plan.keep)
        run.now.append((index.gather(1, sub), sub_valid))
        run.ragged.append(not bool(sub_valid.all()))
        if run.tokens is not None and run.cache is not None:
            announce(run.cache, run.tokens.take(*run.now[-1]), self.schedule.drops[stage - 1])
        return take_merged(hidden, sub, sub_valid, plan.into, plan.weight)

    def finish(self, run: Run, hidden: Tensor) -> None:
        """The drop after the last layer, of whose tokens the output (B, n, d) has them all."""
        if self.schedule.drops_at_end and run.index is not None and len(run.now) == self.schedule.count:
            self._enter(run, self.schedule.count, hidden, self.decoder.layers[-1], None, None)

    # -- after the decoder -----------------------------------------------------------------------------------
    @torch.compiler.disable
    def store(self, run: Run) -> None:
        """Enter the cached tokens of a visual forward into the ledger; align the cache if wanted."""
        assert run.index is not None and run.visual is not None
        if self.schedule.aligned:
            align_cache(run, self.schedule)
        ledger, end = run.ledger, run.ledger.end
        pictured = run.visual.any(1)
        ledger.pictured = pictured if ledger.pictured is None else ledger.pictured | pictured
        entered, stages = run.now[0][1].sum(1), run.stages() if self.schedule.evicts else run.now
        ragged = [*run.ragged, *(not bool(valid.all()) for _, valid in stages[len(run.now) :])]
        for stage, (index, valid) in enumerate(stages):
            logical = run.index.gather(1, index)
            ledger.append(stage, end, logical, run.past_slots + index, valid, ragged[stage])
            ledger.shift[stage] = ledger.shift[stage] + entered - valid.sum(1)
        for stage in range(len(stages)):
            ledger.dropped[stage] = end + run.query_length - ledger.slots[stage].shape[1]
        if run.real is not None:
            ledger.real = torch.cat([ledger.real, run.real.to(ledger.device)], 1)
        for layer in counting_layers(run.cache):
            settle(layer, ledger)

    def deepstack(
        self, original: Callable[..., Any], hidden: Tensor, places: Tensor, embeds: Tensor
    ) -> Tensor:
        """Index the features that Qwen3-VL adds after its first layers anew once a stage has begun."""
        run = self.context.run
        if run is None or run.visual is None or len(run.now) == 1:
            return original(hidden, places, embeds)
        index, valid = run.now[-1]
        row = (places.flatten().long().cumsum(0) - 1).view(places.shape)
        now = places.gather(1, index) & valid
        return original(hidden, now, embeds[row.gather(1, index)[now].to(embeds.device)])
