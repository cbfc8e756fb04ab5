"""Hand-made prompts inside an LLM: hidden states, attention and positions without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken import PrefillTokens

NORM = 1 / (1 + torch.arange(64))  # weights of a last norm


def prompt(
    before: int = 3,
    visual: int | list[int] = 12,
    after: int = 5,
    *,
    layer: int = 1,
    num_layers: int = 32,
    heads: int = 4,
    dim: int = 8,
    seed: int = 0,
    between: int = 2,
    drafts: int = 0,
    attention: Tensor | None = None,
    preview: Tensor | None = None,
    hidden: Tensor | None = None,
    marked: list[int] = (),
    separators: list[int] = (),
    units: int | None = None,
    total: int | None = None,
    memory: dict | None = None,
    keys: Tensor | None = None,
) -> PrefillTokens:
    """Text, images of the given sizes with text between them, text, and drafts after the prompt.

    `attention` and `preview` (heads, n, n) are causal softmaxed maps, random where not given; `marked` and
    `separators` are indices among the visual tokens.
    """
    sizes = [visual] if isinstance(visual, int) else visual
    kinds: list[int] = [-1] * before
    for i, size in enumerate(sizes):
        kinds += ([-1] * between if i else []) + [i] * size
    kinds += [-1] * (after + drafts)
    item = torch.tensor(kinds)
    n, is_visual = len(kinds), item >= 0
    generator = torch.Generator().manual_seed(seed)

    def causal() -> Tensor:
        logits = torch.randn(heads, n, n, generator=generator) * 2
        return logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)

    attention = causal() if attention is None else attention
    preview = causal() if preview is None else preview
    places = is_visual.nonzero()[:, 0]
    flags = [torch.zeros(n, dtype=torch.bool) for _ in range(2)]
    for flag, indices in zip(flags, (marked, separators), strict=True):
        flag[places[torch.tensor(list(indices), dtype=torch.long)]] = True
    hidden = torch.randn(n, dim, generator=generator) if hidden is None else hidden
    keys = torch.randn(n, dim, generator=generator) if keys is None else keys
    angle = torch.arange(n)[:, None] * 10000.0 ** -(torch.arange(0, dim, 2) / dim)
    angle = torch.cat([angle, angle], -1)
    return PrefillTokens(
        layer=layer,
        hidden_states=hidden,
        visual=is_visual,
        positions=torch.arange(n),
        total_visual=int(is_visual.sum()) if total is None else total,
        attention_rows=lambda rows: attention[:, rows],
        preview_rows=lambda rows: preview[:, rows],
        end=n - drafts,
        num_layers=num_layers,
        units=len(sizes) if units is None else units,
        item=item,
        separator=flags[1],
        marked=flags[0],
        rotary=(angle.cos(), angle.sin()),
        memory={} if memory is None else memory,
        keys=lambda: keys,
        normed=lambda: hidden * NORM[:dim],
    )


def after_keeping(tokens: PrefillTokens, keep: Tensor, layer: int, seed: int = 1) -> PrefillTokens:
    """The same prompt before a later layer, with only the chosen visual tokens left."""
    stay = ~tokens.visual
    stay[tokens.visual_rows[keep]] = True
    rows = stay.nonzero()[:, 0]
    n = len(rows)
    logits = torch.randn(4, n, n, generator=torch.Generator().manual_seed(seed))
    attention = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    return PrefillTokens(
        layer=layer,
        hidden_states=tokens.hidden_states[rows],
        visual=tokens.visual[rows],
        positions=tokens.positions[rows],
        total_visual=tokens.total_visual,
        attention_rows=lambda r: attention[:, r],
        preview_rows=lambda r: attention.flip(0)[:, r] * 0.5 + attention[:, r] * 0.5,
        end=int((rows < tokens.end).sum()),
        num_layers=tokens.num_layers,
        units=tokens.units,
        item=tokens.item[rows],
        separator=tokens.separator[rows],
        marked=tokens.marked[rows],
        rotary=tuple(t[rows] for t in tokens.rotary),
        memory=tokens.memory,
    )


def run_through(strategy, tokens: PrefillTokens) -> list[int]:
    """Ask a strategy at all of its layers in turn -> visual tokens that every layer of the LLM reads."""
    layers = strategy.prefill_layers(tokens.num_layers)
    reads, n = [], len(tokens.visual_rows)
    for layer in range(tokens.num_layers):
        if layer in layers:
            tokens.layer = layer
            answer = strategy.select_in_prefill(tokens).check(n)
            tokens, n = after_keeping(tokens, answer.keep, layer, seed=layer), len(answer.keep)
        reads.append(n)
    return reads
