"""A forward of the language model with visual tokens: shorten its input, restore the length of its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..storage import PromptTokens, Storage
from .eviction import Eviction
from .forward_context import Admission, Call, ForwardContext, ForwardObserver, Plan, ReadTokens, Run
from .generation import prompt_ends, queries_of
from .kept_arguments import KeptArguments, Turn
from .layer_hooks import LayerHooks
from .ledger import Ledger
from .logical_cache import make_logical, slots_in
from .masks import sees_itself
from .packed_rows import packed_rows, within
from .ragged import take, tokenwise
from .recurrent_states import counting_layers
from .stored_cache import adopt_storage, announce, check_form, check_read_at_once, hold_back
from .transformers_names import cache_in, check_prompt, hidden_states_of, recomputes

Planning = Callable[[Call, Run, Tensor, Tensor], Plan | None]


class VisualTurn:
    """Chooses and gathers visual tokens at the entrance of the language model, and stretches its output.

    Args:
        adapter: the model's parts.
        planner: `planner(call, run, embeds, real) -> Plan | None`, called once per forward.
        layers: the hooks inside the language model.
        positions: "original" or "renumber".
        context: shared with the other hooks.
        gate: tells which calls belong to the patch.
        observer: notified before and after the language model.
        storage: the form of the KV cache, None for that of transformers.
    """

    def __init__(
        self,
        adapter: Any,
        planner: Planning,
        layers: LayerHooks,
        positions: str,
        context: ForwardContext,
        gate: Admission,
        observer: ForwardObserver,
        storage: Storage | None = None,
    ) -> None:
        self.storage = storage
        self.model, self.decoder = adapter.model, adapter.decoder
        self.planner, self.layers = planner, layers
        self.schedule, self.renumber = layers.schedule, positions == "renumber"
        self.context, self.gate, self.observer = context, gate, observer
        self.kept = KeptArguments(self.decoder, layers.masks, self.renumber, adapter.features_in_layers)
        axes = 3 if hasattr(adapter.base, "get_rope_index") else 1
        self.eviction = Eviction(self.decoder, storage, context, observer, axes)

    # Forwards with visual tokens depend on data (the survivors) and keep state: torch.compile leaves them to
    # eager mode, and traces decode steps and text turns as one graph.
    @torch.compiler.disable
    def enter(
        self, call: Call, cache: Any, ledger: Ledger | None, visual: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The arguments of the language model for the kept tokens; None if the call stays as it is."""
        embeds = kwargs["inputs_embeds"]
        self._begin(embeds.device)
        turn = self._open_ledger(cache, ledger, embeds, kwargs.get("attention_mask"))
        self._find_real(turn, call)
        run, plan = self._plan(turn, call, cache, visual, kwargs)
        self.context.read = ReadTokens(turn.real, turn.real)
        stores = self.storage is not None and not self.context.disabled
        inside = self.schedule.inside and not self.context.disabled
        if plan is None and turn.fresh and not inside and not stores:
            self._observe(run, turn)
            return None  # nothing to drop
        if kwargs.get("output_router_logits") and not self.context.disabled:
            self._check_experts(turn, plan is not None or inside)
        self._own_cache(turn, run)
        kwargs = self.kept.of(turn, run, plan, kwargs)
        if stores:
            self._announce(run, kwargs["inputs_embeds"])
        self._observe(run, turn)
        return args, kwargs

    def _observe(self, run: Run, turn: Turn) -> None:
        if not self.context.disabled:  # the report stays that of the call before
            self.observer.entered(run, turn.real)

    def _begin(self, device: torch.device) -> None:
        context = self.context
        context.disabled = self.gate.disabled()
        if not context.disabled:
            self.gate.check()
        context.reading, context.unread = device, False
        self.observer.before_prefill(device)
        self.layers.check_training()

    # -- open the ledger -------------------------------------------------------------------------------------
    def _open_ledger(self, cache: Any, ledger: Ledger | None, embeds: Tensor, mask: Any) -> Turn:
        real = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        if ledger is None:
            schedule = self.schedule
            of_stage = schedule.tables, len(embeds), embeds.device, schedule.stored
            new = Ledger(*of_stage, self.renumber, self.layers.chunked)
            past = 0 if cache is None else int(cache.get_seq_length())
            return Turn(new, True, past, mask, None, real)
        self.layers.check_ledger(ledger)
        ledger.follow(slots_in(cache), grow=True)
        return Turn(ledger, False, ledger.end, mask, None, real)

    # -- find real tokens ------------------------------------------------------------------------------------
    @staticmethod
    def _find_real(turn: Turn, call: Call) -> None:
        mask, ledger = turn.mask, turn.ledger
        if isinstance(mask, Tensor) and mask.ndim == 2:
            turn.mask_2d = mask if call.mask_aligned or turn.fresh else ledger.align(mask)
            turn.real = turn.mask_2d[:, turn.past : turn.past + turn.real.shape[1]].bool()
        elif mask is not None:
            turn.real = sees_itself(mask, turn.past if turn.fresh else ledger.slots[0].shape[1], turn.real)

    # -- plan ------------------------------------------------------------------------------------------------
    def _plan(
        self, turn: Turn, call: Call, cache: Any, visual: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Run, Plan | None]:
        real, length = turn.real, turn.real.shape[1]
        ends = prompt_ends(self.model, self.context, turn.past, real, call.input_ids)
        queries = queries_of(ends, real, visual)
        run = Run(cache, turn.ledger, length, visual=visual, ends=ends, queries=queries, real=real)
        run.tokenwise = tokenwise(kwargs, *real.shape)
        asked = kwargs.get("logits_to_keep")
        run.asked = asked if isinstance(asked, int) else 0
        if not turn.past:
            run.first = packed_rows(self.decoder, kwargs, call.given.get("attention_mask"), cache)
        if self.schedule.inside and not self.context.disabled:
            self._check_inside(run, turn.past + length)
        if not self.context.disabled:
            self.eviction.check(cache, turn.past + length, run.first is not None)
            check_read_at_once(self.storage, self.context.prompt, turn.past + length, cache)
        return run, self.planner(call, run, kwargs["inputs_embeds"], real)

    def _check_inside(self, run: Run, tokens: int) -> None:
        """Raise NotImplementedError if a strategy that drops inside the LLM cannot see the prompt's end."""
        if run.first is not None:
            raise NotImplementedError(
                "A strategy that drops inside the LLM reads one prompt per row, found rows whose positions"
                " start again: give each prompt a row of its own, or prune before the LLM."
            )
        prompt = self.context.prompt
        if prompt is None:
            return
        if prompt.length > tokens:
            raise NotImplementedError(
                "A strategy that drops inside the LLM reads the end of the prompt: leave out"
                " prefill_chunk_size."
            )
        self.layers.check_windows(tokens + prompt.new_tokens)

    @staticmethod
    def _check_experts(turn: Turn, drops: bool) -> None:
        """Raise NotImplementedError if the model's head will count tokens that the mixture did not read."""
        if turn.mask_2d is not None and (drops or not bool(turn.real.all())):
            raise NotImplementedError(
                "The load-balancing loss of a mixture of experts counts every token of attention_mask, of"
                " which some are not read under this strategy: leave out output_router_logits=True, or"
                " attention_mask if no row is padded."
            )

    # -- gather ----------------------------------------------------------------------------------------------
    def _own_cache(self, turn: Turn, run: Run) -> None:
        """Let the cache count prompt tokens, and note its content."""
        ledger = turn.ledger
        if turn.fresh and run.cache is not None:
            self.eviction.check_history(run.cache)
            self._adopt(run.cache, ledger)
            ledger.follow(slots_in(run.cache), grow=True)  # a text turn went before
        elif run.cache is not None and self.storage is not None and not self.context.disabled:
            check_form(run.cache, self.storage)
        run.past_slots = ledger.slots[0].shape[1]
        if turn.mask_2d is not None and run.past_slots:
            run.past_seen = turn.mask_2d[:, ledger.dropped[0] : ledger.end].bool()
        self.context.run = run
        ledger.announced = True

    @staticmethod
    def _announce(run: Run, embeds: Tensor) -> None:
        assert run.index is not None and run.visual is not None
        valid = run.now[0][1]
        run.tokens = PromptTokens(run.visual.gather(1, run.index) & valid, valid, embeds)
        if run.cache is not None:
            announce(run.cache, run.tokens)

    def note_text(self, run: Run, mask: Any) -> None:
        """Note what a forward without visual tokens shows, and how the cache packs it.

        Raises:
            ValueError: the cache was filled in another form than that of the strategy.
        """
        if isinstance(mask, Tensor) and mask.ndim == 2:
            run.seen = mask[:, run.ledger.dropped[0] :].bool().to(run.ledger.device)
        if self.storage is None or self.context.disabled:
            return
        check_form(run.cache, self.storage)
        prompt = self.context.prompt
        hold_back(run.cache, prompt is not None and prompt.drafts)

    def hold(self, cache: Any, embeds: Tensor, mask: Any) -> Ledger | None:
        """A ledger for a cache that is read without visual tokens, if the strategy evicts text as well."""
        if not self.eviction.evicts_text or self.gate.disabled():
            return None
        batch, length = embeds.shape[:2]
        device = embeds.device
        self.eviction.check(cache, length)
        if cache is None:
            return None
        self.eviction.check_history(cache)
        schedule = self.schedule
        ledger = Ledger(1, batch, device, schedule.stored, self.renumber, self.layers.chunked)
        self._adopt(cache, ledger)
        ledger.follow(slots_in(cache), grow=True)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            seen = mask[:, : ledger.end].bool().to(device)
            ledger.slots[0] = torch.where(seen, ledger.slots[0], -1)
            ledger.ragged[0] = not bool(seen.all())
        return ledger

    def _adopt(self, cache: Any, ledger: Ledger) -> None:
        schedule, layers = self.schedule, self.decoder.config.num_hidden_layers
        if self.storage is not None and not self.context.disabled:
            adopt_storage(cache, self.storage, layers)
        cuts = bool(schedule.aligned or (schedule.evicts and schedule.sparse.interval))
        make_logical(cache, ledger, layers, schedule.inside, cuts)

    # -- after the language model ----------------------------------------------------------------------------
    @torch.compiler.disable
    def leave(self, out: Any) -> Any:
        """The output at the model's input length; None if it has that length, or there is no output."""
        context = self.context
        run, context.run = context.run, None
        device, context.reading = context.reading, None
        if out is None or device is None:
            return None
        if run is not None and run.visual is not None and run.index is not None:
            self.layers.finish(run, hidden_states_of(out))
            self._settle_cache(run, out)
        if not context.disabled:
            self.observer.after_prefill(run, device)
        if run is None or run.visual is None or run.index is None:
            return None
        answered = hidden_states_of(out).shape[1]
        check_prompt(run, self.schedule, answered)
        if run.cache is not None:
            self.layers.store(run)
        assert run.real is not None
        left, there = run.now[-1]  # a drop after the last layer included
        kept = _kept(run, run.index.gather(1, left), there)
        context.read = ReadTokens(run.real, kept)
        if run.choice is not None and run.choice.survivors is None:
            run.choice.survivors = kept
        index, valid = run.now[self.schedule.last]
        final = run.index.gather(1, index)
        column = _stretched(run, final, valid)
        if answered < final.shape[1]:  # nothing before the last tokens was answered for, nor is it asked for
            column = (column - (final.shape[1] - answered)).clamp(min=0)[:, -answered:]
        if isinstance(out, tuple):
            return (take(out[0], column), *out[1:])
        last, states = out.last_hidden_state, getattr(out, "hidden_states", None)
        out.last_hidden_state = take(last, column)
        if states and states[-1] is last:  # transformers ties them, and heads read either
            out.hidden_states = (*states[:-1], out.last_hidden_state)
        return out

    def _settle_cache(self, run: Run, out: Any) -> None:
        # transformers made it inside the language model, which was given none
        if run.cache is None and (made := cache_in(out)) is not None:
            self._adopt(made, run.ledger)
            run.cache = made
            self._settle_stored(run)
        if (
            recomputes(self.decoder)
            and run.cache is not None
            and not any(x.is_initialized for x in counting_layers(run.cache))
        ):
            run.cache = None  # transformers takes no cache to layers that are computed again in backward

    def _settle_stored(self, run: Run) -> None:
        """Let layers that were filled before they had a strategy's form take it."""
        if run.tokens is None:
            return
        for i, layer in enumerate(run.cache.layers):
            if layer.is_initialized:
                layer.settle(run.tokens.take(*run.now[min(self.schedule.reads(i), len(run.now) - 1)]))
                if self.layers.sparse is not None:
                    self.layers.sparse.pack(run, i)


def _kept(run: Run, final: Tensor, valid: Tensor) -> Tensor:
    """(B, q) bool: the tokens that the last stage still has."""
    times = torch.zeros(final.shape[0], run.query_length, dtype=torch.long, device=final.device)
    return times.scatter_add_(1, final, valid.long()) > 0  # filler points anywhere and adds nothing


def _stretched(run: Run, final: Tensor, valid: Tensor) -> Tensor:
    """(B, q) int64: for every original position the column of the nearest kept token at or before it.

    logits_to_keep, labels and generate() find the length they expect, and the next-token loss of the first
    text token after an image is the one of the shortened sequence.
    """
    column = torch.full((final.shape[0], run.query_length), -1, dtype=torch.long, device=final.device)
    row, place = valid.nonzero(as_tuple=True)
    column[row, final[row, place]] = place
    column = column.cummax(1).values if run.first is None else within(run.first, final, column)
    return torch.where(column < 0, valid.long().argmax(1, keepdim=True), column)
