"""A KV cache of 1 to 4 bits a number, written a second time: in float64, a group at a time, packing nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tests import oracle
from tests.oracle import CACHE


@dataclass
class Form:
    key_bits: float = 1.5
    value_bits: float = 1.58
    group: int = 4
    residual: int = 8
    value_groups: str = "channel"
    gamma: float = 0.7
    scale: bool = True
    sign: bool = True
    protect: float = 0.5


def levels(x: Tensor, bits: int) -> Tensor:
    """Equation 4 of VidKV on the numbers of one group."""
    low, high = x.min(), x.max()
    if high == low:
        return x
    step = (high - low) / (2**bits - 1)
    return ((x - low) / step).round() * step + low


def three(x: Tensor, form: Form) -> Tensor:
    """Equation 6: sign, or 0 for small numbers; times the mean magnitude of the others."""
    large = x.abs() > form.gamma * x.abs().mean()
    step = x.abs()[large].mean() if form.scale and large.any() else torch.ones((), dtype=x.dtype)
    return torch.where(large, x.sign() * step, 0)


def one(x: Tensor, form: Form) -> Tensor:
    """Equation 5: the sign times the mean magnitude; without `sign` 0 in place of minus it."""
    if form.sign:
        return torch.where(x >= 0, 1.0, -1.0).to(x) * x.abs().mean()
    return (x >= 0).to(x) * x.abs().mean()


def along_tokens(x: Tensor, real: Tensor, group: int, fn) -> Tensor:
    """`fn` on the real numbers of every group of rows in every column of (n, D)."""
    out = x.clone()
    for first in range(0, len(x), group):
        rows = torch.arange(first, min(first + group, len(x)))
        rows = rows[real[rows]]
        for c in range(x.shape[1] if len(rows) else 0):
            out[rows, c] = fn(x[rows, c])
    return out


def quantised_keys(x: Tensor, real: Tensor, form: Form, hard: Tensor | None) -> Tensor:
    """(H, n, D) as they are read back; `hard` are the channels with more bits, None for all of them."""
    out = torch.empty_like(x)
    for h, head in enumerate(x):
        if hard is None:
            out[h] = along_tokens(head, real, form.group, lambda v: levels(v, int(form.key_bits)))
            continue
        easy = ~torch.isin(torch.arange(x.shape[2]), hard)
        out[h][:, hard] = along_tokens(head[:, hard], real, form.group, lambda v: levels(v, 2))
        if not easy.any():
            continue
        # the whole Fourier transform, of which vtoken stores half
        f = torch.view_as_real(torch.fft.fft(head[:, easy])).flatten(1)
        f = along_tokens(f, real, form.group, lambda v: v if v.abs().max() < 1e-12 else one(v, form))
        out[h][:, easy] = torch.fft.ifft(torch.view_as_complex(f.unflatten(1, (-1, 2)).contiguous())).real
    return out


def quantised_values(x: Tensor, real: Tensor, form: Form, protected: Tensor) -> Tensor:
    def fn(v: Tensor, bits: float) -> Tensor:
        return three(v, form) if bits < 2 else levels(v, int(bits))

    out = torch.empty_like(x)
    for places, bits in ((~protected, form.value_bits), (protected, 2)):
        at = places.nonzero()[:, 0]
        for h, head in enumerate(x):
            if form.value_groups == "channel":
                out[h, at] = along_tokens(head[at], real[at], form.group, lambda v, b=bits: fn(v, b))
            else:
                ones = torch.ones(x.shape[2], dtype=torch.bool)
                out[h, at] = along_tokens(head[at].T, ones, form.group, lambda v, b=bits: fn(v, b)).T
    return out


class Naive(DynamicLayer):
    """One row, whose groups begin `filler` slots before its first token."""

    def begin(self, form: Form, filler: int = 0) -> Naive:
        self.form, self.filler, self.coming, self.hard, self.packed = form, filler, None, None, 0
        return self

    def announce(self, scores: Tensor, visual: Tensor) -> None:
        """Of the next forward: (n,) relevance, and (n,) bool."""
        self.coming = scores, visual

    def update(self, key: Tensor, value: Tensor, *args, **kwargs):
        read = super().update(key, value)
        coming, self.coming = self.coming, None
        waiting = self.keys.shape[2] + self.filler - self.packed
        if coming is not None or waiting >= self.form.residual:
            self.quantise(waiting // self.form.group * self.form.group, coming)
        return read

    def quantise(self, slots: int, coming) -> None:
        """Put what is read back in place of the next tokens, among `slots` that may begin with filler."""
        if not slots:
            return
        form, here = self.form, slice(max(0, self.packed - self.filler), self.packed - self.filler + slots)
        filler = max(0, self.filler - self.packed)
        real = torch.arange(slots) >= filler
        keys, values = (
            torch.cat([x[0, :, :1].expand(-1, filler, -1), x[0, :, here]], 1)
            for x in (self.keys, self.values)
        )
        share = form.key_bits - 1
        if form.key_bits < 2 and self.hard is None:
            seen = keys[:, real]
            spread = seen.amax((0, 1)) - seen.amin((0, 1))
            count = int(keys.shape[2] * share)
            count = min(32, keys.shape[2]) if share and not count else count
            self.hard = spread.argsort(descending=True)[:count]
        protected = torch.zeros(slots, dtype=torch.bool)
        if coming is not None and form.protect and form.value_bits < 2:
            before = self.keys.shape[2] + self.filler - self.packed - len(coming[0])
            scores, visual = (torch.cat([x.new_zeros(before), x])[:slots] for x in coming)
            n = int(visual.sum())
            count = min(max(int(n * form.protect) // form.group, 1), n // form.group) * form.group
            best = scores.masked_fill(~visual, -torch.inf).argsort(descending=True)[:count]
            protected[best] = True
        keys = quantised_keys(keys, real, form, self.hard if form.key_bits < 2 else None)
        values = quantised_values(values, real, form, protected)
        self.keys, self.values = self.keys.clone(), self.values.clone()
        self.keys[0, :, here], self.values[0, :, here] = keys[:, real], values[:, real]
        self.packed += slots


def naive_cache(layers: int, form: Form, filler: int = 0) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [Naive().begin(form, filler) for _ in range(layers)]
    cache.layer_class_to_replicate = None
    return cache


def answer(
    model, inputs: dict, visual: Tensor, form: Form, steps: int, said: Tensor | None = None, at: int = 0
) -> tuple[Tensor, Tensor]:
    """Greedy ids (batch, steps) and logits (steps, batch, vocabulary), a row at a time, without padding.

    The tokens `said` (m,) follow the `at`-th of the answer.
    """
    prompts = oracle.capture(model, inputs)
    width = max(len(prompt) for prompt in prompts)
    caches = []
    for b, prompt in enumerate(prompts):
        cache = naive_cache(oracle.decoder_of(model).config.num_hidden_layers, form, width - len(prompt))
        here = visual[b, prompt.index]
        for layer in cache.layers:
            layer.announce(prompt.embeds @ prompt.embeds[~here].mean(0), here)
        caches.append(cache)
    return decode(model, prompts, caches, steps, said, at)


@torch.no_grad()
def decode(
    model, prompts: list[oracle.Prompt], caches: list, steps: int, said: Tensor | None = None, at: int = 0
) -> tuple[Tensor, Tensor]:
    """`answer` of prompts, each with a cache of its own."""
    lm, embed, ids, logits = oracle.decoder_of(model), model.get_input_embeddings(), [], []
    for prompt, cache in zip(prompts, caches, strict=True):
        now, row_ids, row_logits, first = prompt, [], [], True
        for step in range(steps):
            extra: dict = {}
            if now.deepstack is not None and first:
                everywhere = torch.ones(1, len(now), dtype=torch.bool)
                extra = dict(visual_pos_masks=everywhere, deepstack_visual_embeds=now.deepstack)
            mask = torch.ones(1, cache.get_seq_length() + len(now), dtype=torch.long)
            where = dict(position_ids=now.positions[..., None, :], attention_mask=mask)
            out = lm(inputs_embeds=now.embeds[None], **where, **{CACHE: cache}, use_cache=True, **extra)
            row_logits.append(oracle.head_of(model)(out.last_hidden_state[0, -1]))
            row_ids.append(oracle.pick(row_logits[-1]))
            before, new, first = len(prompt), row_ids[-1][None], False
            for token in torch.cat([new, said]) if said is not None and step == at - 1 else new:
                prompt = prompt.append(embed(token[None]))
            now = prompt.take(torch.arange(before, len(prompt)))
        ids.append(torch.stack(row_ids))
        logits.append(torch.stack(row_logits))
    return torch.stack(ids), torch.stack(logits, 1)
