"""Hooks at the entrance of the language model, which shorten a prompt and restore its length in the output.

A forward pre-hook on the language model, which takes `inputs_embeds`, `position_ids`, the mask and
DeepStack features, gathers the tokens that a plan keeps; a forward hook stretches `last_hidden_state` back
to the prompt's length. There are only hooks and instance attributes, and the state of a forward lives in a
`threading.local`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers.masking_utils
from torch import Tensor, nn

from ..adapters.base import language_model_of
from ..hooks import Wrapped, rebuilt
from ..streams import unwrapped
from .forward_context import Call, Run
from .ledger import Ledger
from .logical_cache import ledger_of, slots_in
from .prompt import EncodedVisuals
from .short_outputs import short_outputs
from .transformers_names import cache_in, changed, check_names
from .unread_features import Unread
from .visual_turn import VisualTurn


class EntranceHooks:
    """The hooks that shorten a prompt before and inside the language model.

    Args:
        adapter: the model's parts.
        turn: reads the forwards that bring visual tokens.
        unread: told of embeddings without visual tokens.
        read: `read(modality, output) -> EncodedVisuals | None`, the record in features that come ready-made.
    """

    def __init__(
        self,
        adapter: Any,
        turn: VisualTurn,
        unread: Unread | None = None,
        read: Callable[[str, Any], EncodedVisuals | None] = lambda modality, output: None,
    ) -> None:
        self.adapter, self.turn, self.unread, self.read = adapter, turn, unread, read
        self.model, self.base, self.decoder = adapter.model, adapter.base, adapter.decoder
        self.context, self.gate, self.layers = turn.context, turn.gate, turn.layers
        self.base_arguments = list(inspect.signature(self.base.forward).parameters)
        self.decoder_arguments = list(inspect.signature(self.decoder.forward).parameters)
        self.wrapped = Wrapped()
        self.handles: list[Any] = []
        check_names(adapter, self.layers.hooks_layers)
        h = self.handles
        if self.model is not self.base:
            h.append(self.model.register_forward_pre_hook(self._before_model))
        eager = turn.eviction.storage is not None
        before, after = (
            (self._base_begins, self._base_ends) if eager else (self._before_base, self._after_base)
        )
        h.append(self.base.register_forward_pre_hook(before, with_kwargs=True))
        h.append(self.base.register_forward_hook(after, always_call=True))
        before, after = self._before_decoder, self._after_decoder
        before, after = (self._decoder_begins, self._decoder_ends) if eager else (before, after)
        h.append(self.decoder.register_forward_pre_hook(before, with_kwargs=True))
        h.append(self.decoder.register_forward_hook(after, always_call=True))
        if hasattr(self.base, "get_placeholder_mask"):
            self.wrapped.wrap(self.base, "get_placeholder_mask", self._placeholders)
        if hasattr(self.decoder, "_deepstack_process"):
            self.wrapped.wrap(self.decoder, "_deepstack_process", self.layers.deepstack)
        self.model_arguments = list(inspect.signature(self.model.forward).parameters)
        if "labels" in self.model_arguments or adapter.short_outputs:
            # PEFT calls `forward` itself, around every hook
            self.wrapped.wrap(self.model, "forward", self._forward)
        make_masks = getattr(self.model, "create_masks_for_generate", None)
        self.wrapped.wrap(
            self.model,
            "create_masks_for_generate",
            self._masks_for_generate,
            make_masks or transformers.masking_utils.create_masks_for_generate,
        )

    def remove(self) -> None:
        if self.context.run is not None:  # left by an interrupted forward
            self.context.run.ledger.announced = False
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.layers.hooks.remove()
        self.turn.eviction.hooks.remove()
        self.wrapped.remove()

    # Evictions break a traced graph, which then loses its writes to thread-local state: all four run eagerly.
    @torch.compiler.disable
    def _base_begins(self, *given: Any) -> Any:
        return self._before_base(*given)

    @torch.compiler.disable
    def _base_ends(self, *given: Any) -> None:
        self._after_base(*given)

    @torch.compiler.disable
    def _decoder_begins(self, *given: Any) -> Any:
        return self._before_decoder(*given)

    @torch.compiler.disable
    def _decoder_ends(self, *given: Any) -> Any:
        return self._after_decoder(*given)

    # -- calls of the models ---------------------------------------------------------------------------------
    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.model_arguments, args, strict=False)) | kwargs
        outer, self.context.labels = self.context.labels, given.get("labels")
        try:
            if self.adapter.short_outputs and self.gate.serves() and not self.gate.disabled():
                return short_outputs(self.context, self.adapter.merge, original, given)
            return original(*args, **kwargs)
        finally:
            self.context.labels = outer

    def _placeholders(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        call = self.context.call
        if call is not None:
            given = dict(zip(inspect.signature(original).parameters, args, strict=False)) | kwargs
            for i, modality in enumerate(("image", "video")):
                if given.get(f"{modality}_features") is not None:
                    mask = out[i] if isinstance(out, tuple) else out
                    read = [m for m, encoded in call.encoded.items() if encoded is not None]
                    of = read[0] if len(read) == 1 and not isinstance(out, tuple) else modality  # a shared id
                    call.visual[of] = mask[..., 0] if mask.ndim == 3 else mask
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
        """Raise RuntimeError if the model no longer consists of the parts that have the hooks."""
        if torch.compiler.is_compiling() or not self.gate.serves():
            return
        for name, there, now in (
            ("base model", self.base, self.model.base_model),
            ("language model", self.decoder, language_model_of(self.model)),
        ):
            if unwrapped(there) is not unwrapped(now):
                raise rebuilt(f"The {name} is another than the one that was patched")

    # While another thread adds or removes a hook, it may be called without `kwargs`, in a call that is not
    # its own.
    def _before_base(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None or not self.gate.forward_begins():
            self.context.call = None
            return None
        self._check_replica(module, self.base)
        if self.model is self.base:
            self._check_parts()
        call = Call()
        given = dict(zip(self.base_arguments, args, strict=False)) | kwargs
        call.given, call.input_ids = given, given.get("input_ids")
        outputs, early = given.get("mm_encoder_outputs"), self.context.early
        pixels = any(given.get(name) is not None for name in self.adapter.pixel_arguments)
        call.has_features = bool(outputs) or pixels
        if early is not None and early.encoded:
            call.input_ids, call.encoded, call.has_features = early.input_ids, early.encoded, True
        if isinstance(outputs, dict):
            call.encoded = {m: self.read(m, out) for m, out in outputs.items() if out is not None}
        if call.has_features:
            self._set_call(call)
        else:
            self.context.call = call
        cache, mask = cache_in(given), given.get("attention_mask")
        ledger = call.ledger = ledger_of(cache)
        if ledger is None or not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        if given.get("position_ids") is None and hasattr(module, "rope_deltas"):
            # Qwen derives positions from this mask: aligned later, before the language model
            return None
        if not cache.is_compileable:
            ledger.follow(slots_in(cache), grow=False)
        # here, because Gemma3 and PaliGemma make their masks between here and the decoder
        call.mask_aligned = True
        if cache.is_compileable and self.layers.masks.flash:
            x = given["inputs_embeds"] if call.input_ids is None else call.input_ids
            if mask.shape[1] != int(cache.get_seq_length()) + x.shape[1]:
                return None  # generate() had it made by _masks_for_generate
        return (), given | {"attention_mask": self._align(ledger, cache, mask)}

    @torch.compiler.disable
    def _set_call(self, call: Call | None) -> None:
        """Note the call, in eager mode: a graph break loses a traced graph's writes to thread-local state."""
        self.context.call = call

    def _after_base(self, module: nn.Module, args: Any, out: Any) -> None:
        call = self.context.call
        if call is None:
            return
        if call.has_features:
            self._set_call(None)
        else:
            self.context.call = None
        self.gate.forward_ended()
        if out is not None and call.has_features and not call.read and not self.context.disabled:
            raise changed(
                f"{type(module).__name__} was given images or videos and did not call"
                f" {type(self.decoder).__name__} (if it was compiled and called before it was patched, call"
                " torch.compiler.reset())"
            )

    def _align(self, ledger: Ledger, cache: Any, mask: Tensor) -> Tensor:
        mask = ledger.align(mask)
        # flash attention + static cache: transformers slices the keys to the mask, which begins at slot 0
        return mask[:, ledger.dropped[0] :] if cache.is_compileable and self.layers.masks.flash else mask

    def _masks_for_generate(self, original: Callable[..., Any], **kwargs: Any) -> Any:
        """Static cache: generate() makes the 4-D mask itself, before and outside of the compiled forward."""
        cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
        ledger = ledger_of(cache)
        if ledger is not None and cache is not None and self.gate.serves():
            embeds = kwargs["inputs_embeds"]
            if mask is None and ledger.needs_mask:
                length = int(cache.get_seq_length()) + embeds.shape[1]
                mask = torch.ones(embeds.shape[0], length, dtype=torch.long, device=embeds.device)
            if mask is not None and mask.ndim == 2:
                given, aligned = kwargs.get("attention_mask"), self._align(ledger, cache, mask)
                made = original(**kwargs | {"attention_mask": aligned})
                return given if made is aligned else made  # some models leave it to the language model
        return original(**kwargs)

    # -- the entrance of the language model ------------------------------------------------------------------
    def _before_decoder(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        self.context.run = None
        if kwargs is not None and args:
            args, kwargs = (), dict(zip(self.decoder_arguments, args, strict=False)) | kwargs
        call, embeds = self.context.call, None if kwargs is None else kwargs.get("inputs_embeds")
        cache = None if kwargs is None else cache_in(kwargs)
        ledger = ledger_of(cache)
        if call is None and kwargs is not None and ledger is not None and self.gate.serves():
            # the language model alone, after its patched model has read
            return self._text_turn(Call(ledger=ledger), cache, ledger, args, dict(kwargs))
        if call is None or embeds is None or kwargs is None:
            return self._without_visual(embeds)
        call.read = True
        if not torch.compiler.is_compiling():
            self.layers.hooks.refresh()
            self.turn.eviction.hooks.refresh()
        if ledger is not call.ledger:
            raise changed(
                f"{type(self.base).__name__} did not hand its KV cache on to {type(decoder).__name__}"
            )
        visual = self._visual(call, embeds) if call.visual or call.has_features else None
        if visual is None:
            self._without_visual(embeds)
            if ledger is None:
                ledger = self.turn.hold(cache, embeds, kwargs.get("attention_mask"))
            return None if ledger is None else self._text_turn(call, cache, ledger, args, dict(kwargs))
        return self.turn.enter(call, cache, ledger, visual, args, dict(kwargs))

    def _without_visual(self, embeds: Tensor | None) -> None:
        """Note that the language model reads embeddings without visual tokens, as far as the model tells."""
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
            read = [m for m, encoded in call.encoded.items() if encoded is not None]
            found = self.adapter.find_placeholders(call.input_ids)  # modalities may share an id
            call.visual = {m: mask for m, mask in found.items() if not read or m in read}
        call.visual = {m: mask.to(embeds.device) for m, mask in call.visual.items()}
        call.visual = {m: mask for m, mask in call.visual.items() if bool(mask.any())}
        encoded = [m for m, of in call.encoded.items() if of is not None and of.total]
        if encoded and not call.visual and call.input_ids is not None and not self.gate.disabled():
            raise NotImplementedError(
                f"This {self.adapter.config.model_type} model encoded {encoded[0]}s, of which vtoken found no"
                f" placeholder in the prompt: give prompts without {encoded[0]}s, or an adapter that has"
                " find_placeholders (docs/adding-a-model.md)."
            )
        return functools.reduce(torch.logical_or, call.visual.values()) if call.visual else None

    def _text_turn(self, call: Call, cache: Any, ledger: Ledger, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds, mask, positions = (kwargs.get(k) for k in ("inputs_embeds", "attention_mask", "position_ids"))
        embeds = kwargs["input_ids"] if embeds is None else embeds
        batch, length = embeds.shape[:2]  # type: ignore[union-attr]
        if not cache.is_compileable:
            ledger.follow(slots_in(cache), grow=False)
        self.layers.check_ledger(ledger)
        run = self.context.run = Run(cache, ledger, length)
        run.reviews = self.layers.sparse is not None and self.layers.sparse.due(run)
        ledger.announced = True
        if isinstance(mask, Tensor) and mask.ndim == 2 and not call.mask_aligned:
            kwargs["attention_mask"] = self._align(ledger, cache, mask)
        elif mask is None and ledger.needs_mask:
            tail = cache.get_seq_length() - ledger.end + length
            now = torch.ones(batch, tail, dtype=torch.bool, device=embeds.device)  # type: ignore[union-attr]
            kwargs["attention_mask"] = ledger.validity(0, now)
        if self.turn.renumber:
            if positions is None:
                start = cache.get_seq_length()
                positions = (torch.arange(length, device=embeds.device) + start).expand(batch, length)  # type: ignore[union-attr]
            kwargs["position_ids"] = self.context.run.positions = positions - ledger.shift[0][:, None]
        if self.turn.storage is not None or self.layers.sparse is not None:
            self.turn.note_text(run, kwargs.get("attention_mask"))
        counted = self.turn.eviction.before_text(self.context.run, positions, embeds)
        return args, kwargs if counted is None else kwargs | {"position_ids": counted}

    # -- after the language model ----------------------------------------------------------------------------
    def _after_decoder(self, decoder: nn.Module, args: Any, out: Any) -> Any:
        run = self.context.run
        if run is not None:
            run.ledger.announced = False
        left = None
        if self.context.reading is not None:
            left = self.turn.leave(out)
        elif run is not None and out is not None and self.layers.sparse is not None:
            self.layers.sparse.after_text(run)
        self.context.run = None
        if out is not None:
            self.turn.eviction.after(run)
        return left
