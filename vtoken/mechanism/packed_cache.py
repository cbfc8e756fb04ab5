"""Cache layers that hold tokens as packed codes, and the latest ones as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..storage import Packed, PromptTokens
from .packed_tokens import PackedKeys, PackedValues, protected_tokens
from .quantised import Rows


class PackedLayer(DynamicLayer):
    """A cache layer whose earlier tokens are packed codes, those of `keys` and `values` after them.

    A forward reads its own tokens, and those that are not packed yet, as they are. After a forward with
    visual tokens, and after one that leaves `residual` tokens or more, all whole groups are packed. A token
    is packed once and never again. Groups are counted from the first slot of the batch.
    """

    is_initialized: bool
    keys: Any
    values: Any
    storage: Packed
    coming: PromptTokens | None
    waits: bool  # whether tokens of an answer are not packed, as they may be taken back
    packed_keys: PackedKeys | None
    packed_values: PackedValues | None

    def begin(self, storage: Packed, number: int) -> None:
        """Take the form; tokens that the layer has stay as they are for now."""
        self.storage, self.coming, self.waits = storage, None, False
        self.packed_keys = self.packed_values = None

    def announce(self, tokens: PromptTokens) -> None:
        """Note the tokens of the next `update`."""
        self.coming = tokens

    def settle(self, tokens: PromptTokens) -> None:
        """Pack tokens that were stored before the layer had this form, `tokens` the last of them."""
        self._quantize(tokens)

    # Packed parts grow in steps, each of which would be traced anew.
    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_heads(value_states)
        coming, self.coming = self.coming, None
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        keys, values = self.read_keys(), self.values
        if self.packed_values is not None:
            values = torch.cat([self.packed_values.read().to(values.dtype), values], dim=-2)
        if self.is_due(coming):
            self._quantize(coming)
        return keys, values

    def is_due(self, coming: PromptTokens | None) -> bool:
        """Whether tokens are packed after a forward, whose tokens are `coming` if it had pictures."""
        return coming is not None or (not self.waits and self.keys.shape[-2] >= self.storage.residual)

    def read_keys(self) -> Tensor:
        """(B, H, n, D): the keys of all tokens."""
        packed = [] if self.packed_keys is None else [self.packed_keys.read().to(self.keys.dtype)]
        return torch.cat([*packed, self.keys], dim=-2)

    def _check_heads(self, values: Tensor) -> None:
        group, width = self.storage.group, values.shape[-1]
        if self.storage.value_groups == "token" and width % group:
            raise ValueError(
                f"Values in groups of {group} channels need heads of a multiple of {group} channels, found"
                f" {width}: choose another group, or groups along tokens."
            )

    @torch.no_grad()
    def _quantize(self, tokens: PromptTokens | None) -> None:
        """Pack the whole groups of the tokens that are not packed; `tokens` are the last of them.

        The name tells the mechanism, as that of transformers' own quantised layers, that slots of this layer
        cannot be gathered.
        """
        form, stored = self.storage, self.keys.shape[-2]
        n = stored // form.group * form.group
        if not n:
            return
        real = protected = None
        if tokens is not None:
            before = stored - tokens.real.shape[1]
            real = torch.nn.functional.pad(tokens.real.to(self.keys.device), (before, 0), value=True)[:, :n]
            real = None if bool(real.all()) else real
            protected = self._protected(tokens, before, n)
        keys, values = self.keys[:, :, :n], self.values[:, :, :n]
        channels = None if self.packed_keys is None else self.packed_keys.channels
        new_keys = PackedKeys.of(keys, real, form, channels)
        self._store(new_keys, PackedValues.of(values, real, form, protected), n)

    def _store(self, keys: Any, values: Any, n: int) -> None:
        """Add the packed form of the first `n` tokens that are not packed, and let these go."""
        self.packed_keys = keys if self.packed_keys is None else self.packed_keys.join(keys)
        self.packed_values = values if self.packed_values is None else self.packed_values.join(values)
        self.keys, self.values = self.keys[:, :, n:].clone(), self.values[:, :, n:].clone()

    def _protected(self, tokens: PromptTokens, before: int, n: int) -> Tensor | None:
        """(B, n) bool: the protected of the first n tokens; None if nothing is to be protected."""
        form = self.storage
        if form.relevance is None or not form.protect or form.value_bits >= 2:
            return None
        scores, visual = (
            torch.nn.functional.pad(x, (before, 0))[:, :n].to(self.keys.device)
            for x in (form.relevance(tokens), tokens.visual)
        )
        return protected_tokens(scores, visual, form.protect, form.group)

    # -- the cache's operations ------------------------------------------------------------------------------
    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        waiting = self.keys.shape[-2] if self.keys.ndim > 1 else 0
        return waiting + (0 if self.packed_keys is None else self.packed_keys.slots)

    def stored_bytes(self) -> int:
        """Bytes of the tensors that the layer holds."""
        if not self.is_initialized:
            return 0
        parts = self.keys, self.values, self.packed_keys, self.packed_values
        return sum(part.nbytes for part in parts if part is not None)

    def reset(self) -> None:
        self.keys = self.values = self.packed_keys = self.packed_values = self.coming = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; what is left of a group stays packed."""
        if not tokens_to_remove or not self.is_initialized:
            return
        left, waiting = max(0, self.get_seq_length() - abs(tokens_to_remove)), 0
        if self.packed_keys is not None and self.packed_values is not None:
            packed = self.packed_keys.slots
            waiting = max(0, left - packed)
            if not left:
                self.packed_keys = self.packed_values = None
            elif left < packed:
                self.packed_keys = self.packed_keys.first(left)
                self.packed_values = self.packed_values.first(left)
        else:
            waiting = left
        self.keys, self.values = self.keys[:, :, :waiting], self.values[:, :, :waiting]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        self.each(lambda t: t[rows.to(t.device)])

    def each(self, fn: Rows) -> None:
        """Put `fn` of every tensor in its place."""
        if not self.is_initialized or self.keys.ndim == 1:
            return
        self.keys, self.values = fn(self.keys), fn(self.values)
        if self.packed_keys is not None and self.packed_values is not None:
            self.packed_keys, self.packed_values = self.packed_keys.each(fn), self.packed_values.each(fn)
