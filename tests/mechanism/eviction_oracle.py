"""Decoding with a KV cache that loses tokens, written out here: keys are kept without their rotation.

Every forward rotates all cached keys anew, at positions that are counted inside the cache, and attends row by
row; no line of vtoken, of transformers' caches or of its masks.
"""

from __future__ import annotations

import types
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from tests import oracle


def exact(model):
    """The model in float64, whose norms and rotary tables are computed in float64 as well."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm, module)
    rotary = oracle.decoder_of(model).rotary_emb
    width = 2 * len(rotary.inv_freq)
    base = oracle.decoder_of(model).config.rope_parameters["rope_theta"]
    rotary.inv_freq = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    narrow = rotary.forward

    def wide(*args, **kwargs):
        double = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
        with double, mock.patch.object(torch, "float", torch.float64):
            return narrow(*args, **kwargs)

    rotary.forward = wide
    return model


@contextmanager
def heard(model):
    """``with heard(model) as logits``: those of the last token of every forward, which generate() rounds to
    float32.
    """
    logits: list[Tensor] = []
    hook = oracle.head_of(model).register_forward_hook(lambda m, a, out: logits.append(out[:, -1]))
    try:
        yield logits
    finally:
        hook.remove()


def _norm(self, x: Tensor) -> Tensor:
    epsilon = getattr(self, "variance_epsilon", getattr(self, "eps", None))
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


class Row:
    """One conversation without padding.

    Attributes:
        positions: (axes, n), as the model counts them, of the cached tokens (of all layers).
        keys, values: per layer (heads, n, d), before any rotation.
        deepstack: per early layer (q, hidden), added after it in the next forward.
    """

    def __init__(self, model) -> None:
        self.model, self.lm = model, oracle.decoder_of(model)
        self.deepstack: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.positions = torch.empty(0)
        self.probabilities: list[Tensor] = []

    def places(self) -> Tensor:
        """(axes, n): the positions at which the cached and the present tokens stand."""
        return self.positions

    def read(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Logits (q, vocabulary) of a forward of (q, hidden); its tokens join the cache."""
        positions = positions[None] if positions.ndim == 1 else positions[-3:]
        fresh = not len(self.positions)
        self.positions = positions if fresh else torch.cat([self.positions, positions], 1)
        places, hidden, self.probabilities = self.places(), embeds[None], []
        rotary = self.lm.rotary_emb(hidden, places[:, None] if len(places) > 1 else places)
        for i, layer in enumerate(self.lm.layers):
            hidden = hidden + self._attend(i, layer, layer.input_layernorm(hidden), rotary)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            if i < len(self.deepstack):
                hidden = hidden + self.deepstack[i][None]
        self.deepstack = []
        return oracle.head_of(self.model)(self.lm.norm(hidden))[0]

    def _attend(self, i: int, layer, x: Tensor, rotary) -> Tensor:
        attention = layer.self_attn
        parts = []
        for which in "qkv":
            y = getattr(attention, f"{which}_proj")(x)[0]
            y = y.view(len(y), -1, attention.head_dim)
            norm = getattr(attention, f"{which}_norm", None)
            parts.append((y if norm is None else norm(y)).transpose(0, 1))
        q, k, v = parts
        if len(self.keys) == i:
            self.keys.append(k[:, :0])
            self.values.append(v[:, :0])
        self.keys[i] = torch.cat([self.keys[i], k], 1)
        self.values[i] = torch.cat([self.values[i], v], 1)
        cos, sin = (t[0] for t in self.rotary_of(i, rotary))
        times = q.shape[0] // k.shape[0]
        keys = _turned(self.keys[i], cos, sin).repeat_interleave(times, 0)
        values = self.values[i].repeat_interleave(times, 0)
        fresh, n = q.shape[1], keys.shape[1]
        logits = _turned(q, cos[-fresh:], sin[-fresh:]) @ keys.mT * attention.scaling
        sees = torch.arange(n)[None] <= torch.arange(n - fresh, n)[:, None]
        probabilities = logits.masked_fill(~sees, -torch.inf).softmax(-1)
        self.probabilities.append(probabilities)
        return attention.o_proj((probabilities @ values).transpose(0, 1).flatten(1))[None]

    def rotary_of(self, i: int, rotary):
        return rotary


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    half = x.shape[-1] // 2
    return torch.cat([a * cos[:, :half] - b * sin[:, :half], b * cos[:, half:] + a * sin[:, half:]], -1)


class WindowRow(Row):
    """The first `sinks` and the last `recent` tokens stay after every forward."""

    def __init__(self, model, sinks: int, recent: int) -> None:
        super().__init__(model)
        self.sinks, self.recent, self.lost = sinks, recent, False

    def places(self) -> Tensor:
        places = self.positions.clone()
        if self.lost and self.sinks:
            first = places[:, : self.sinks].max() + 1
            window = places[:, self.sinks : self.sinks + self.recent]
            places[:, self.sinks :] -= (window.min() - first).clamp(min=0)
        return places

    def read(self, embeds: Tensor, positions: Tensor) -> Tensor:
        logits = super().read(embeds, positions)
        n = self.positions.shape[1]
        if n > self.sinks + self.recent:
            stay = [*range(self.sinks), *range(n - self.recent, n)]
            self.positions, self.lost = self.positions[:, stay], True
            self.keys = [k[:, stay] for k in self.keys]
            self.values = [v[:, stay] for v in self.values]
        return logits


class AnswerRow(Row):
    """Visual tokens leave each layer after every `every` tokens of the answer."""

    def __init__(
        self, model, visual: Tensor, wanted: int, every: int, rounds: int, newest: bool = False
    ) -> None:
        super().__init__(model)
        layers = len(self.lm.layers)
        self.visual, self.wanted, self.every, self.rounds = [visual.tolist()] * layers, wanted, every, rounds
        self.newest, self.steps, self.total = newest, 0, int(visual.sum())
        self.scores = [[0.0] * len(visual) for _ in range(layers)]
        self.waiting: list[list[Tensor]] = [[] for _ in range(layers)]
        self.of_layer: list[Tensor] = []

    def read(self, embeds: Tensor, positions: Tensor) -> Tensor:
        answer = len(self.positions) > 0
        logits = super().read(embeds, positions)
        if not answer:
            self.of_layer = [torch.arange(self.positions.shape[1])] * len(self.keys)
            return logits
        self.steps += 1
        self.of_layer = [torch.cat([p, p.new_tensor([self.positions.shape[1] - 1])]) for p in self.of_layer]
        for i, probabilities in enumerate(self.probabilities):
            self.visual[i] = [*self.visual[i], False]
            self.scores[i] = [*self.scores[i], 0.0]
            self.waiting[i].append(probabilities[:, 0].mean(0))
        if self.steps % self.every == 0:
            self._evict()
        return logits

    def rotary_of(self, i: int, rotary):
        """Cached keys of a layer are other tokens than those of another one."""
        if not self.of_layer:
            return rotary
        now = torch.arange(rotary[0].shape[1] - 1, rotary[0].shape[1])
        index = torch.cat([self.of_layer[i], now])
        return tuple(t[:, index] for t in rotary)

    def _evict(self) -> None:
        part = -(-(self.total - self.wanted) // self.rounds)
        for i in range(len(self.keys)):
            for received in self.waiting[i][-1 if self.newest else 0 :]:
                for slot, share in enumerate(received.tolist()):
                    self.scores[i][slot] += share
            self.waiting[i] = []
            seen = [slot for slot, flag in enumerate(self.visual[i]) if flag]
            left = max(self.wanted, len(seen) - part)
            best = set(sorted(seen, key=lambda slot: -self.scores[i][slot])[:left])
            stay = [slot for slot, flag in enumerate(self.visual[i]) if not flag or slot in best]
            self.keys[i], self.values[i] = self.keys[i][:, stay], self.values[i][:, stay]
            self.of_layer[i] = self.of_layer[i][stay]
            self.visual[i] = [self.visual[i][slot] for slot in stay]
            self.scores[i] = [self.scores[i][slot] for slot in stay]


@torch.no_grad()
def follow(row: Row, prompt: oracle.Prompt, said: Tensor, turns: list[int] | None = None) -> Tensor:
    """Logits of the prompt's last token, and after each of the tokens (n,) that were said after it.

    `turns` are the numbers of tokens that each later forward reads, one each if None.
    """
    row.deepstack = prompt.deepstack or []
    logits = [row.read(prompt.embeds, prompt.positions)[-1]]
    embed, at = row.model.get_input_embeddings(), 0
    last = int((prompt.positions if prompt.positions.ndim == 1 else prompt.positions[-3:]).max())
    for n in turns or [1] * len(said):
        tokens = said[at : at + n]
        positions = (last + 1 + at + torch.arange(n)).expand(*prompt.positions.shape[:-1], n)
        logits.append(row.read(embed(tokens), positions)[-1])
        at += n
    return torch.stack(logits)
