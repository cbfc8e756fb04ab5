"""How a sequence becomes shorter inside unmodified transformers.

A forward pre-hook on the language model, where `inputs_embeds`, `position_ids`, the mask and DeepStack features meet,
gathers the tokens that a plan keeps; a forward hook stretches `last_hidden_state` back to the prompt's length. Everything
is done with hooks and instance attributes, and state of a forward lives in a `threading.local`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers.masking_utils
from torch import Tensor, nn

from ..streams import unwrapped
from .cache import Ledger, ledger_of, make_logical, physical_length
from .generation import prompt_ends, queries_of
from .hooks import Wrapped, rebuilt
from .layers import LayerStages, Stage
from .masks import cut_mask, sees_itself
from .packed import packed_lengths, packed_mask, packed_rows, ranks_of, within
from .ragged import expand_batch, overwrite, right_aligned, take, take_merged
from .state import Admission, Call, Observer, Plan, Run, State
from .transformers_contract import cache_in, changed, check_names, check_prompt, hidden_states_of, recomputes
from .unread import Unread


class Sequence:
    """The hooks that shorten a prompt in front of and inside the language model.

    Args:
        adapter: knows the parts of the model.
        planner: `planner(call, run, embeds, real) -> Plan | None`, asked once per forward that brings visual tokens.
        stages: drops inside the LLM, ascending.
        positions: "original" or "renumber".
        state: shared with whoever watches the vision side.
        gate: tells which calls are this patch's.
        observer: told what entered and left the language model.
        aligned: LLM layers whose cache is cut to the last stage's tokens behind the prompt.
        unread: asked about embeddings without visual tokens.
        read: `read(modality, output) -> EncodedVisuals | None`, what features that come ready-made carry.
    """

    def __init__(
        self,
        adapter: Any,
        planner: Callable[[Call, Run, Tensor, Tensor], Plan | None],
        stages: list[Stage],
        positions: str,
        state: State,
        gate: Admission,
        observer: Observer,
        aligned: tuple[int, ...] = (),
        unread: Unread | None = None,
        read: Callable[[str, Any], Any] = lambda modality, output: None,
    ) -> None:
        self.adapter, self.planner, self.positions = adapter, planner, positions
        self.model, self.base, self.decoder = adapter.model, adapter.base, adapter.decoder
        self.state, self.gate, self.observer = state, gate, observer
        self.unread, self.read = unread, read
        self.base_arguments = list(inspect.signature(self.base.forward).parameters)
        self.decoder_arguments = list(inspect.signature(self.decoder.forward).parameters)
        self.wrapped = Wrapped()
        self.handles: list[Any] = []
        self.stages = LayerStages(self.decoder, stages, state, positions, aligned)
        check_names(adapter, self.stages.hooks_layers)
        h = self.handles
        if self.model is not self.base:
            h.append(self.model.register_forward_pre_hook(self._before_model))
        h.append(self.base.register_forward_pre_hook(self._before_base, with_kwargs=True))
        h.append(self.base.register_forward_hook(self._after_base, always_call=True))
        h.append(self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        h.append(self.decoder.register_forward_hook(self._after_decoder, always_call=True))
        if hasattr(self.base, "get_placeholder_mask"):
            self.wrapped.wrap(self.base, "get_placeholder_mask", self._placeholders)
        if hasattr(self.decoder, "_deepstack_process"):
            self.wrapped.wrap(self.decoder, "_deepstack_process", self.stages.deepstack)
        self.model_arguments = list(inspect.signature(self.model.forward).parameters)
        if "labels" in self.model_arguments:  # PEFT calls `forward` itself, around every hook
            self.wrapped.wrap(self.model, "forward", self._labelled)
        make_masks = getattr(self.model, "create_masks_for_generate", None)
        self.wrapped.wrap(
            self.model,
            "create_masks_for_generate",
            self._masks_for_generate,
            make_masks or transformers.masking_utils.create_masks_for_generate,
        )

    def remove(self) -> None:
        if self.state.run is not None:  # of an interrupted forward
            self.state.run.ledger.announced = False
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.stages.hooks.remove()
        self.wrapped.remove()

    # -- what the models are given ------------------------------------------------------------------------------
    def _labelled(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer, self.state.labels = self.state.labels, kwargs.get("labels")
        if args and self.state.labels is None:
            self.state.labels = dict(zip(self.model_arguments, args, strict=False)).get("labels")
        try:
            return original(*args, **kwargs)
        finally:
            self.state.labels = outer

    def _placeholders(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        call = self.state.call
        if call is not None:
            given = dict(zip(inspect.signature(original).parameters, args, strict=False)) | kwargs
            for i, modality in enumerate(("image", "video")):
                if given.get(f"{modality}_features") is not None:
                    mask = out[i] if isinstance(out, tuple) else out
                    call.visual[modality] = mask[..., 0] if mask.ndim == 3 else mask
        return out

    def _before_model(self, module: nn.Module, args: Any) -> None:
        self._check_replica(module, self.model)
        self._check_parts()

    @staticmethod
    def _check_replica(module: nn.Module, own: nn.Module) -> None:
        if module is not own:
            raise NotImplementedError(
                "nn.DataParallel runs copies of the model, which read the vision tower of the original: use "
                "DistributedDataParallel."
            )

    def _check_parts(self) -> None:
        """Raise RuntimeError if the model no longer consists of the parts that carry the hooks."""
        if torch.compiler.is_compiling() or not self.gate.serves():
            return
        for name, there, now in (
            ("base model", self.base, self.model.base_model),
            ("language model", self.decoder, self.model.get_decoder()),
        ):
            if unwrapped(there) is not unwrapped(now):
                raise rebuilt(f"The {name} is another than the one that was patched")

    # A hook that another thread is putting on or taking off is called without `kwargs`, in a call that is not its own.
    def _before_base(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None or not self.gate.forward_begins():
            self.state.call = None
            return None
        self._check_replica(module, self.base)
        if self.model is self.base:
            self._check_parts()
        call = Call()
        given = dict(zip(self.base_arguments, args, strict=False)) | kwargs
        call.given, call.input_ids = given, given.get("input_ids")
        outputs = given.get("mm_encoder_outputs")
        pixels = any(given.get(name) is not None for name in self.adapter.pixel_arguments)
        call.has_features = bool(outputs) or pixels
        if isinstance(outputs, dict):
            call.encoded = {m: self.read(m, out) for m, out in outputs.items() if out is not None}
        if call.has_features:
            self._set_call(call)
        else:
            self.state.call = call
        cache, mask = cache_in(given), given.get("attention_mask")
        ledger = call.ledger = ledger_of(cache)
        if ledger is None or not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        if given.get("position_ids") is None and hasattr(module, "rope_deltas"):
            return None  # Qwen derives positions from this mask: aligned later, in front of the language model
        if not cache.is_compileable:
            ledger.follow(physical_length(cache.layers[0]), grow=False)
        call.mask_aligned = True  # here, because Gemma3 and PaliGemma make their masks between here and the decoder
        if cache.is_compileable and self._flash:
            x = given["inputs_embeds"] if call.input_ids is None else call.input_ids
            if mask.shape[1] != int(cache.get_seq_length()) + x.shape[1]:
                return None  # generate() had it made by _masks_for_generate
        return (), given | {"attention_mask": self._align(ledger, cache, mask)}

    @torch.compiler.disable
    def _set_call(self, call: Call | None) -> None:
        """Note the call in eager mode: what a traced graph writes to a thread's state is lost where the graph breaks."""
        self.state.call = call

    def _after_base(self, module: nn.Module, args: Any, out: Any) -> None:
        call = self.state.call
        if call is None:
            return
        if call.has_features:
            self._set_call(None)
        else:
            self.state.call = None
        self.gate.forward_ended()
        if out is not None and call.has_features and not call.read and not self.state.disabled:
            raise changed(
                f"{type(module).__name__} was given images or videos and did not call {type(self.decoder).__name__} (if it was "
                "compiled and called before it was patched, call torch.compiler.reset())"
            )

    @property
    def _flash(self) -> bool:
        return "flash" in (self.decoder.config._attn_implementation or "")

    def _align(self, ledger: Ledger, cache: Any, mask: Tensor) -> Tensor:
        mask = ledger.align(mask)
        # flash attention + static cache: transformers slices the keys to the mask, so the mask starts at slot 0
        return mask[:, ledger.dropped[0] :] if cache.is_compileable and self._flash else mask

    def _masks_for_generate(self, original: Callable[..., Any], **kwargs: Any) -> Any:
        """Static cache: generate() makes the 4-D mask itself, in front of (and outside) the compiled forward."""
        cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
        ledger = ledger_of(cache)
        if ledger is not None and cache is not None and self.gate.serves():
            embeds = kwargs["inputs_embeds"]
            if mask is None and ledger.ragged[0]:
                length = int(cache.get_seq_length()) + embeds.shape[1]
                mask = torch.ones(embeds.shape[0], length, dtype=torch.long, device=embeds.device)
            if mask is not None and mask.ndim == 2:
                kwargs["attention_mask"] = self._align(ledger, cache, mask)
        return original(**kwargs)

    # -- the entrance of the language model ---------------------------------------------------------------------
    # What reads visual tokens depends on data (who survives) and keeps state: torch.compile leaves it to eager mode, and
    # traces decode steps and text turns as one graph.
    def _before_decoder(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        self.state.run = None
        if kwargs is not None and args:
            args, kwargs = (), dict(zip(self.decoder_arguments, args, strict=False)) | kwargs
        call, embeds = self.state.call, None if kwargs is None else kwargs.get("inputs_embeds")
        cache = None if kwargs is None else cache_in(kwargs)
        ledger = ledger_of(cache)
        if call is None and kwargs is not None and ledger is not None and self.gate.serves():
            # the language model alone, on what its patched model has read
            return self._text_turn(Call(ledger=ledger), cache, ledger, args, dict(kwargs))
        if call is None or embeds is None or kwargs is None:
            return self._without_visual(embeds)
        call.read = True
        if not torch.compiler.is_compiling():
            self.stages.hooks.refresh()
        if ledger is not call.ledger:
            raise changed(f"{type(self.base).__name__} did not hand its KV cache on to {type(decoder).__name__}")
        visual = self._visual(call, embeds) if call.visual or call.has_features else None
        if visual is None:
            self._without_visual(embeds)
            return None if ledger is None else self._text_turn(call, cache, ledger, args, dict(kwargs))
        return self._visual_turn(call, cache, ledger, visual, args, dict(kwargs))

    def _without_visual(self, embeds: Tensor | None) -> None:
        """The language model reads embeddings that bring no visual tokens, as far as the model tells."""
        unread = self.unread
        if unread is not None and unread.given and embeds is not None and embeds.shape[1] > 1:
            self._check_unread(unread, embeds)

    @torch.compiler.disable
    def _check_unread(self, unread: Unread, embeds: Tensor) -> None:
        if self.gate.serves() and not self.gate.disabled():
            unread.check(embeds)

    @torch.compiler.disable
    def _visual(self, call: Call, embeds: Tensor) -> Tensor | None:
        """(B, q) bool: the visual tokens of this forward, None if there are none."""
        if not call.visual and call.has_features and call.input_ids is not None:
            call.visual = self.adapter.find_placeholders(call.input_ids)
        call.visual = {m: mask.to(embeds.device) for m, mask in call.visual.items()}
        call.visual = {m: mask for m, mask in call.visual.items() if bool(mask.any())}
        return functools.reduce(torch.logical_or, call.visual.values()) if call.visual else None

    def _text_turn(self, call: Call, cache: Any, ledger: Ledger, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds, mask, positions = (kwargs.get(k) for k in ("inputs_embeds", "attention_mask", "position_ids"))
        embeds = kwargs["input_ids"] if embeds is None else embeds
        batch, length = embeds.shape[:2]  # type: ignore[union-attr]
        if not cache.is_compileable:
            ledger.follow(physical_length(cache.layers[0]), grow=False)
        self.stages.check_ledger(ledger)
        self.state.run = Run(cache, ledger, length)
        ledger.announced = True
        if isinstance(mask, Tensor) and mask.ndim == 2 and not call.mask_aligned:
            kwargs["attention_mask"] = self._align(ledger, cache, mask)
        elif mask is None and ledger.ragged[0]:
            tail = cache.get_seq_length() - ledger.end + length
            now = torch.ones(batch, tail, dtype=torch.bool, device=embeds.device)  # type: ignore[union-attr]
            kwargs["attention_mask"] = ledger.validity(0, now)
        if self.positions == "renumber":
            if positions is None:
                start = cache.get_seq_length()
                positions = (torch.arange(length, device=embeds.device) + start).expand(batch, length)  # type: ignore[union-attr]
            kwargs["position_ids"] = self.state.run.positions = positions - ledger.shift[0][:, None]
        return args, kwargs

    @torch.compiler.disable
    def _visual_turn(
        self, call: Call, cache: Any, ledger: Ledger | None, visual: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        embeds = kwargs["inputs_embeds"]
        batch, length, _ = embeds.shape
        device = embeds.device
        self.state.disabled = self.gate.disabled()
        if not self.state.disabled:
            self.gate.check()
        self.state.prefill, self.state.unread = device, False
        self.observer.before_prefill(device)
        self.stages.check_training()
        fresh = ledger is None
        if ledger is None:
            ledger = Ledger(self.stages.count + 1, batch, device, self.stages.tables, self.stages.renumber)
            past = 0 if cache is None else int(cache.get_seq_length())
        else:
            self.stages.check_ledger(ledger)
            ledger.follow(physical_length(cache.layers[0]), grow=True)
            past = ledger.end

        mask = kwargs.get("attention_mask")
        mask_2d = None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            mask_2d = mask if call.mask_aligned or fresh else ledger.align(mask)
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
        if mask_2d is not None:
            real = mask_2d[:, past : past + length].bool()
        elif mask is not None:
            real = sees_itself(mask, past if fresh else ledger.slots[0].shape[1], real)

        ends = prompt_ends(self.state, past, real)
        queries = queries_of(ends, real, visual)
        run = Run(cache, ledger, length, visual=visual, ends=ends, queries=queries, real=real)
        if not past:
            run.first = packed_rows(self.decoder, kwargs, call.given.get("attention_mask"), cache)
        self._check_packed(run)
        prompt = self.state.generating
        if prompt is not None and self.stages.count and not self.state.disabled:
            if prompt.length > past + length:
                raise NotImplementedError(
                    "A strategy that drops inside the LLM reads the end of the prompt: leave out prefill_chunk_size."
                )
            self.stages.check_windows(past + length + prompt.new_tokens)
        plan = self.planner(call, run, embeds, real)
        if plan is None and fresh and (not self.stages.count or self.state.disabled):
            self.observer.entered(run, real)
            return None  # nothing to drop: the call goes on untouched
        if fresh and cache is not None:
            self._adopt(cache, ledger)
            ledger.follow(physical_length(cache.layers[0]), grow=True)  # a text turn went before
        run.past_slots = ledger.slots[0].shape[1]
        if mask_2d is not None and run.past_slots:
            run.past_seen = mask_2d[:, ledger.dropped[0] : ledger.end].bool()
        self.state.run = run
        ledger.announced = True

        keep = real if plan is None else (plan.keep.to(device) | ~visual) & real  # padding goes: rows re-align to the right
        index, valid = right_aligned(keep)
        run.index = index
        run.now = [(torch.arange(index.shape[1], device=device).expand(batch, -1), valid)]
        run.ragged = [not bool(valid.all())]

        kwargs["inputs_embeds"] = take_merged(embeds, index, valid, *((plan.into, plan.weight) if plan is not None else ()))
        if plan is not None and plan.source is not None and plan.features is not None:
            kwargs["inputs_embeds"] = overwrite(kwargs["inputs_embeds"], plan.source.gather(1, index), plan.features)
        run.positions = self._positions(kwargs.get("position_ids"), run, keep, real, index)
        kwargs["position_ids"] = run.positions
        if run.first is not None:
            run.ranks = ranks_of(run.first, index, valid)
        kwargs = packed_lengths(kwargs, run.ranks)
        if run.ranks is not None and mask is None:
            kwargs["attention_mask"] = (
                None if self._flash else packed_mask(self.decoder.config, kwargs["inputs_embeds"], run.ranks)
            )
        else:
            kwargs["attention_mask"] = self._mask(mask, mask_2d, real, run)
        self._deepstack(kwargs, run)
        self.observer.entered(run, real)
        return args, kwargs

    def _adopt(self, cache: Any, ledger: Ledger) -> None:
        make_logical(cache, ledger, len(self.decoder.layers), self.stages.count > 0, bool(self.stages.aligned))

    def _check_packed(self, run: Run) -> None:
        """Raise NotImplementedError for packed prompts if something is dropped inside the LLM, where rows are one prompt."""
        if run.first is not None and self.stages.count and not self.state.disabled:
            raise NotImplementedError(
                "A strategy that drops inside the LLM reads one prompt per row, found rows whose positions start again: give "
                "each prompt a row of its own, or prune before the LLM."
            )

    def _positions(self, positions: Tensor | None, run: Run, keep: Tensor, real: Tensor, index: Tensor) -> Tensor:
        """Position ids as the language model would have chosen them, of the kept tokens."""
        ledger = run.ledger
        batch, length = keep.shape
        if positions is None:
            positions = (torch.arange(length, device=keep.device) + ledger.end).expand(batch, length)
        positions = expand_batch(positions.to(keep.device), batch)
        if self.positions == "renumber":
            gone = (~keep & real).long()
            lost = gone.cumsum(1)
            if run.first is not None:  # every packed prompt counts its own
                lost = lost - (lost - gone).gather(1, run.first)
            positions = positions - lost - ledger.shift[0][:, None]
            ledger.shift = [shift + lost[:, -1] for shift in ledger.shift]
        return take(positions, index, dim=-1)

    def _mask(self, mask: Any, mask_2d: Tensor | None, real: Tensor, run: Run) -> Any:
        assert run.index is not None
        valid, ledger = run.now[0][1], run.ledger
        if isinstance(mask, dict):
            return {k: cut_mask(m, run, 0, (run.index, valid), run.query_length) for k, m in mask.items()}
        if mask is not None and mask_2d is None:
            return cut_mask(mask, run, 0, (run.index, valid), run.query_length)
        if mask_2d is not None:
            return torch.cat([mask_2d[:, : ledger.end].bool(), valid & real.gather(1, run.index)], 1).long()
        if run.ragged[0] or ledger.ragged[0] or run.cache is None:
            # without a cache, gaps in position_ids would be read as packed sequences unless a 2-D mask is there
            return ledger.validity(0, valid).long()
        return None

    def _deepstack(self, kwargs: dict[str, Any], run: Run) -> None:
        """Qwen3-VL: one row of features per visual token and early layer, in (sample, position) order."""
        places = kwargs.get("visual_pos_masks")
        if places is None or run.index is None:
            return
        kwargs["visual_pos_masks"] = now = places.gather(1, run.index) & run.now[0][1]
        row = (places.flatten().long().cumsum(0) - 1).view(places.shape).gather(1, run.index)[now]
        kwargs["deepstack_visual_embeds"] = [e[row.to(e.device)] for e in kwargs["deepstack_visual_embeds"]]

    # -- behind the language model ------------------------------------------------------------------------------
    def _after_decoder(self, decoder: nn.Module, args: Any, out: Any) -> Any:
        run = self.state.run
        if run is not None:
            run.ledger.announced = False
        if self.state.prefill is not None:
            return self._after_visual_turn(out)
        self.state.run = None
        return None

    @torch.compiler.disable
    def _after_visual_turn(self, out: Any) -> Any:
        run, self.state.run = self.state.run, None
        device, self.state.prefill = self.state.prefill, None
        if out is None or device is None:
            return None
        self.observer.after_prefill(run, device)
        if run is None or run.visual is None or run.index is None:
            return None
        index, valid = run.now[-1]
        final = run.index.gather(1, index)
        if run.cache is None and (made := cache_in(out)) is not None:  # by the language model, which was given none
            self._adopt(made, run.ledger)
            run.cache = made
        if recomputes(self.decoder) and run.cache is not None and not any(x.is_initialized for x in run.cache.layers):
            run.cache = None  # transformers takes no cache to layers that are computed again in backward
        check_prompt(run, self.stages, hidden_states_of(out).shape[1])
        if run.cache is not None:
            self.stages.store(run)
        if run.choice is not None and run.choice.survivors is None:
            left = torch.zeros_like(run.visual, dtype=torch.long).scatter_add_(1, final, valid.long())
            run.choice.survivors = left > 0
        # Every original position gets the state of the nearest kept token at or before it: logits_to_keep, labels and
        # generate() find the length they expect, and the next-token loss of the first text token after an image is the
        # one of the shortened sequence.
        column = torch.full((final.shape[0], run.query_length), -1, dtype=torch.long, device=final.device)
        row, place = valid.nonzero(as_tuple=True)
        column[row, final[row, place]] = place
        column = column.cummax(1).values if run.first is None else within(run.first, final, column)
        column = torch.where(column < 0, valid.long().argmax(1, keepdim=True), column)
        if isinstance(out, tuple):
            return (take(out[0], column), *out[1:])
        out.last_hidden_state = take(out.last_hidden_state, column)
        return out
