"""Cut the layers of a KV cache after a forward, as a strategy of the stage "cache" declared it.

All layers lose equally many slots, so that one table describes the filler of every layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import Hook, Hooks, rebuilt
from ..storage import AnswerEviction, SinkWindow, Storage
from .answer_eviction import ask, evict, note_visual
from .cache_crop import physical_length
from .cache_window import fill_positions, slide
from .evicting_layers import EvictingLayer
from .forward_context import ForwardContext, ForwardObserver, Run
from .prompt import Prompt
from .recurrent_states import counting_layers


class Eviction:
    """Evictions from the KV caches that a patched model reads.

    Args:
        decoder: the language model.
        storage: the form in which the strategy holds caches, None for that of transformers. A cache that
            another strategy began to evict from keeps its form.
        context: shared with the other hooks.
        observer: told the bytes of the cache.
        axes: of the position ids, 3 for a multimodal rope.
    """

    def __init__(
        self,
        decoder: Any,
        storage: Storage | None,
        context: ForwardContext,
        observer: ForwardObserver,
        axes: int,
    ) -> None:
        self.decoder, self.context, self.observer, self.axes = decoder, context, observer, axes
        self.storage = storage if isinstance(storage, SinkWindow | AnswerEviction) else None
        self.hooks = Hooks(self.find)

    def find(self) -> list[Hook]:
        """The hooks, on the layers that the decoder has now."""
        if not isinstance(self.storage, AnswerEviction):
            return []
        attentions = [getattr(layer, "self_attn", None) for layer in self.decoder.layers]
        if None in attentions:
            raise rebuilt("A layer of the LLM has no self_attn, whose attention is read")
        taps = [functools.partial(self._tap, i) for i in range(len(attentions))]
        return [Hook(m, tap, before=True, kwargs=True) for m, tap in zip(attentions, taps, strict=True)]  # type: ignore[arg-type]

    @torch.compiler.disable
    def _tap(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        run = self.context.run
        if run is not None and run.visual is None and kwargs is not None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            run.memo["asked", i] = hidden, *kwargs["position_embeddings"]

    @property
    def evicts_text(self) -> bool:
        """Whether prompts without pictures lose tokens as well."""
        return isinstance(self.storage, SinkWindow)

    # -- before a forward ------------------------------------------------------------------------------------
    def check(self, cache: Any, tokens: int, packed: bool = False) -> None:
        """Raise NotImplementedError for a forward of `tokens`, those in the cache included, that cannot be
        served.
        """
        prompt = self.context.prompt
        if self.storage is None or (prompt is None and cache is None):
            return
        if cache is None:
            raise NotImplementedError(
                "This strategy acts on the KV cache, found use_cache=False: leave it out, or unpatch the"
                " model."
            )
        if packed and isinstance(self.storage, SinkWindow):
            raise NotImplementedError(
                "A window reads one prompt per row, found rows whose positions start again: give each prompt"
                " a row of its own."
            )
        if prompt is not None and prompt.drafts and self._loses(prompt, tokens):
            raise NotImplementedError(
                "Assisted decoding takes back tokens that this strategy would make room for: leave out"
                " assistant_model and prompt_lookup_num_tokens."
            )

    def _loses(self, prompt: Prompt, tokens: int) -> bool:
        """Whether tokens will be evicted in a `generate`."""
        storage, new = self.storage, prompt.new_tokens
        if isinstance(storage, SinkWindow):
            return not new or tokens + new > storage.sinks + storage.recent
        return isinstance(storage, AnswerEviction)  # drafts count as tokens until they are taken back

    def check_history(self, cache: Any) -> None:
        """Raise NotImplementedError for a cache that was filled before, if its position ids are needed."""
        layers = counting_layers(cache)
        if isinstance(self.storage, SinkWindow) and self.axes > 1 and layers and physical_length(layers[0]):
            raise NotImplementedError(
                "A window needs the position ids of all tokens, found a KV cache that was filled before its"
                " strategy was there: start the conversation with a new cache."
            )

    def before_text(self, run: Run, positions: Any, given: Tensor) -> Tensor | None:
        """Note what an eviction after a forward without visual tokens will read; `given` (B, q, ...).

        Returns the position ids in place of those that the model counts; None if they are the same.
        """
        length, layers = run.query_length, counting_layers(run.cache)
        if not (layers and isinstance(layers[0], EvictingLayer)):
            return None
        start = int(run.cache.get_seq_length())
        prompt = self.context.prompt
        if prompt is not None and start < prompt.length and not self.context.disabled:
            self.check(run.cache, prompt.length)
        if run.positions is None:
            ahead = torch.arange(start, start + length, device=given.device)[None]
            run.positions = ahead if positions is None else positions
        run.positions = run.positions - run.ledger.origin
        return run.positions if run.ledger.origin else None

    # -- after a forward -------------------------------------------------------------------------------------
    def after(self, run: Run | None) -> None:
        """Evict from the cache that a forward has read."""
        if run is not None and run.cache is not None:
            layers = counting_layers(run.cache)
            if layers and isinstance(layers[0], EvictingLayer):
                self._after(run, layers)

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, run: Run, layers: list[Any]) -> None:
        if not layers[0].is_initialized:
            return
        if isinstance(layers[0].storage, SinkWindow):
            fill_positions(run, physical_length(layers[0]), self.axes)
            slide(run.ledger, layers, self.decoder)
        elif run.visual is not None:
            note_visual(run, layers)
        elif self._answers(run, layers):
            ask(run, layers)
            evict(run, layers, self.decoder)
        else:
            for layer in layers:  # the tokens asked are the last ones
                layer.asked = []
        held = sum(layer.nbytes for layer in layers) // run.ledger.batch_size
        if not self.context.disabled:
            self.observer.holds(held, int(layers[0].get_seq_length()))

    def _answers(self, run: Run, layers: list[Any]) -> bool:
        """Whether the forward read tokens of an answer."""
        prompt, before = self.context.prompt, int(layers[0].get_seq_length()) - run.query_length
        return run.query_length == 1 or (prompt is not None and before >= prompt.length > 0)
