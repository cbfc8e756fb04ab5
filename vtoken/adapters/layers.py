"""Dropping at LLM layer k: hidden states, rotary tables, masks and positions are cut from that layer on.

The decoder makes one mask per attention type and one (cos, sin) and hands the same objects to every layer. A pre-hook on the
first layer of a stage gathers the hidden states; pre-hooks on all layers behind it substitute what was gathered, made once
per (stage, layer type).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers.modeling_layers
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from ..kernels import attention_rows, gather_merge
from ..tokens import PrefillTokens, Selection
from .ragged import expand_batch, right_aligned, take

if TYPE_CHECKING:
    from .sequence import Run, State

# Older releases checkpoint `__call__`: hooks run again in backward, when the state of the forward is gone.
HOOKS_INSIDE_CHECKPOINT = "__call__" in vars(transformers.modeling_layers.GradientCheckpointingLayer)


@dataclass
class Stage:
    """A drop in front of LLM layer `layer`: `select(PrefillTokens) -> Selection` over the visual tokens of one prompt."""

    layer: int
    select: Callable[[PrefillTokens], Selection]


class LayerStages:
    """The hooks on decoder layers. Args: the decoder, ascending stages, the shared state."""

    def __init__(self, decoder: nn.Module, stages: list[Stage], state: State) -> None:
        self.decoder, self.state = decoder, state
        self.stages = stages
        layers = list(getattr(decoder, "layers", ()))
        self.stage_of = [sum(s.layer <= i for s in stages) for i in range(len(layers))]
        kinds = getattr(decoder.config, "layer_types", None)
        self.kind = list(kinds[: len(layers)]) if kinds else [None] * len(layers)

    @property
    def count(self) -> int:
        return len(self.stages)

    @property
    def flash(self) -> bool:
        return "flash" in (self.decoder.config._attn_implementation or "")

    def register(self) -> list[Any]:
        handles = []
        layers = getattr(self.decoder, "layers", ())
        for i, layer in enumerate(layers):
            if self.stage_of[i] or self.flash:
                handles.append(layer.register_forward_pre_hook(functools.partial(self._before_layer, i), with_kwargs=True))
            if i + 1 < len(layers) and self.stage_of[i + 1] > self.stage_of[i]:
                tap = functools.partial(self._tap, i)
                handles.append(layer.self_attn.register_forward_pre_hook(tap, with_kwargs=True))
        return handles

    def check_training(self) -> None:
        if self.stages and HOOKS_INSIDE_CHECKPOINT and self.decoder.training:
            if getattr(self.decoder.layers[0], "gradient_checkpointing", False):
                raise NotImplementedError(
                    "Dropping inside the LLM under gradient checkpointing needs a newer transformers, found "
                    f"{transformers.__version__}: upgrade it or prune before the LLM."
                )

    def _tap(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        run = self.state.run
        if run is not None and run.visual is not None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            run.tap = (i, module, hidden, kwargs["position_embeddings"])

    def _before_layer(self, i: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        run = self.state.run
        if run is None:
            return None
        stage, mask = self.stage_of[i], kwargs.get("attention_mask")
        if run.visual is not None and self.flash:
            # rope is applied from position_embeddings; flash attention would read the gaps as packed sequences
            kwargs = kwargs | {"position_ids": None}
        if stage == 0:
            return args, kwargs
        if run.visual is None:
            if mask is None and not run.ledger.ragged[stage]:
                return None
            return args, kwargs | {"attention_mask": self._mask(run, i, stage, mask, args[0])}
        if len(run.now) == stage:
            args = (self._enter(run, stage, args[0]), *args[1:])
        index, _ = run.now[stage]
        kwargs = dict(kwargs)
        key = "rotary", stage, self.kind[i]
        if key not in run.memo:
            cos_sin = kwargs["position_embeddings"]
            run.memo[key] = tuple(take(t.expand(index.shape[0], *t.shape[1:]), index) for t in cos_sin)
        kwargs["position_embeddings"] = run.memo[key]
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = take(expand_batch(positions, index.shape[0]), index, dim=-1)
        kwargs["attention_mask"] = self._mask(run, i, stage, mask, args[0])
        return args, kwargs

    def _enter(self, run: Run, stage: int, hidden: Tensor) -> Tensor:
        """Ask the strategy and gather what it keeps: (B, n, d) -> (B, m, d)."""
        assert run.visual is not None and run.index is not None
        index, valid = run.now[stage - 1]
        prompt_index = run.index.gather(1, index)
        visual = run.visual.gather(1, prompt_index) & valid
        keep, merges = valid.clone(), False
        into = torch.full(hidden.shape[:2], -1, dtype=torch.long, device=hidden.device)
        weight = torch.zeros(hidden.shape[:2], device=hidden.device)
        for b in range(hidden.shape[0]):
            rows = valid[b].nonzero()[:, 0]
            places = rows[visual[b][rows]]
            if not len(places):
                continue
            tokens = PrefillTokens(
                layer=self.stages[stage - 1].layer,
                hidden_states=hidden[b, rows],
                visual=visual[b, rows],
                positions=prompt_index[b, rows],
                total_visual=int(run.visual[b].sum()),
                attention_rows=functools.partial(self._attention_rows, run, b, rows),
            )
            selection = self.stages[stage - 1].select(tokens).check(len(places))
            dropped = torch.ones(len(places), dtype=torch.bool, device=keep.device)
            dropped[selection.keep.to(keep.device)] = False
            keep[b, places[dropped]] = False
            if selection.into is not None and selection.weight is not None:
                merges = True
                target = selection.into.to(places.device)
                into[b, places] = torch.where(target >= 0, places[selection.keep.to(places.device)][target.clamp(min=0)], -1)
                weight[b, places] = selection.weight.to(weight)
        sub, sub_valid = right_aligned(keep)
        run.now.append((index.gather(1, sub), sub_valid))
        run.ragged.append(not bool(sub_valid.all()))
        if not merges:
            return gather_merge(hidden, sub)
        column = torch.full(keep.shape, -1, dtype=torch.long, device=sub.device)
        row, place = sub_valid.nonzero(as_tuple=True)
        column[row, sub[row, place]] = place
        return gather_merge(hidden, sub, torch.where(into >= 0, column.gather(1, into.clamp(min=0)), -1), weight)

    def _mask(self, run: Run, i: int, stage: int, mask: Any, hidden: Tensor) -> Any:
        key = "mask", stage, self.kind[i]  # not id(mask): torch.compile would guard on the object
        if key not in run.memo:
            run.memo[key] = self._make_mask(run, i, stage, mask, hidden)
        return run.memo[key]

    def _make_mask(self, run: Run, i: int, stage: int, mask: Any, hidden: Tensor) -> Any:
        ledger = run.ledger
        now = run.now[stage] if run.visual is not None else None
        if mask is not None:
            return cut_mask(mask, run, stage, now, run.query_length if run.index is None else run.index.shape[1])
        if not (ledger.ragged[stage] or (run.visual is not None and run.ragged[stage])):
            return None
        # filler in this stage, none in the one before
        if now is None:
            tail = run.cache.get_seq_length() - ledger.end + run.query_length
            valid = torch.ones(hidden.shape[0], tail, dtype=torch.bool, device=hidden.device)
        else:
            valid = now[1]
        layer = run.cache.layers[i] if run.cache is not None else None
        saved = getattr(layer, "behind_stage", None)
        if layer is not None:
            layer.behind_stage = None  # the sizes of this very layer
        try:
            return create_causal_mask(
                config=self.decoder.config,
                inputs_embeds=hidden,
                attention_mask=ledger.validity(stage, valid),
                past_key_values=run.cache,
                layer_idx=i if run.cache is not None else None,
            )
        finally:
            if layer is not None:
                layer.behind_stage = saved

    def _attention_rows(self, run: Run, b: int, tokens: Tensor, rows: Tensor) -> Tensor:
        """Softmaxed rows of sample b in the last layer before the drop: (heads, r, n) float32."""
        if run.tap is None:
            raise ValueError("There is no layer before layer 0 whose attention could be read: choose a later layer.")
        i, attention, hidden, (cos, sin) = run.tap
        cos, sin = (t.expand(hidden.shape[0], *t.shape[1:])[b : b + 1, tokens] for t in (cos, sin))
        hidden = hidden[b : b + 1, tokens]
        query = _rotate(_heads(attention, hidden[:, rows], "q"), cos[:, rows], sin[:, rows])
        if run.cache is None or run.past_slots:
            key = _rotate(_heads(attention, hidden, "k"), cos, sin)
        else:
            key = run.cache.layers[i].keys[b : b + 1].index_select(2, tokens)
        causal = torch.arange(hidden.shape[1], device=hidden.device)[None] <= rows[:, None]
        return attention_rows(query, key, attention.scaling, causal[None])[0]

    def deepstack(self, original: Callable[..., Any], hidden: Tensor, places: Tensor, embeds: Tensor) -> Tensor:
        """Qwen3-VL adds features after its first layers: re-index them once a stage has begun."""
        run = self.state.run
        if run is None or run.visual is None or len(run.now) == 1:
            return original(hidden, places, embeds)
        index, valid = run.now[-1]
        row = (places.flatten().long().cumsum(0) - 1).view(places.shape)
        now = places.gather(1, index) & valid
        return original(hidden, now, embeds[row.gather(1, index)[now].to(embeds.device)])


def cut_mask(mask: Any, run: Run, stage: int, now: tuple[Tensor, Tensor] | None, current: int) -> Any:
    """Make a mask of stage 0 one of `stage`. Columns of `mask`: table slots, then what follows them.

    With `now = (index, valid)`, the first `current` of what follows are the current tokens, of which `index` survive
    (columns and rows); without, everything behind the tables survives.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise NotImplementedError(
            f"Attention masks of type {type(mask).__name__} cannot be cut: load the model with attn_implementation='sdpa'."
        )
    ledger, device = run.ledger, mask.device
    width, past_slots, batch = mask.shape[-1], ledger.slots[0].shape[1], ledger.batch_size
    if width < past_slots + current:
        raise NotImplementedError(
            "Dropping inside the LLM cannot serve a sliding-window layer whose window is full: prune before the LLM."
        )
    past = torch.arange(past_slots, device=device).expand(batch, -1) if stage == 0 else ledger.columns[stage]
    usable = ledger.slots[stage] >= 0
    index = None
    if now is not None:
        index, valid = now
        past, usable = torch.cat([past, past_slots + index], 1), torch.cat([usable, valid], 1)
        past_slots = past_slots + current
    rest = width - past_slots
    columns = torch.cat([past, torch.arange(past_slots, width, device=device).expand(batch, rest)], 1)
    usable = torch.cat([usable, usable.new_ones(batch, rest)], 1)
    off = 0 if mask.dtype == torch.bool or mask.ndim == 2 else torch.finfo(mask.dtype).min
    if mask.ndim == 2:  # flash attention
        return mask.expand(batch, width).gather(1, columns) * usable.to(mask.dtype)
    out = mask.expand(batch, *mask.shape[1:])
    if index is not None:
        out = out.gather(2, index[:, None, :, None].expand(batch, out.shape[1], index.shape[1], width))
    out = out.gather(3, columns[:, None, None].expand(batch, *out.shape[1:3], columns.shape[1]))
    out = out.masked_fill(~usable[:, None, None], off)
    if run.static and out.shape[-1] < width:  # static keys stay as long as the cache
        out = nn.functional.pad(out, (0, width - out.shape[-1]), value=off)
    return out


def _heads(attention: nn.Module, x: Tensor, which: str) -> Tensor:
    """(B, n, D) -> (B, heads, n, head_dim) behind the projection and its norm."""
    x = getattr(attention, f"{which}_proj")(x)
    x = x.view(*x.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{which}_norm", None)
    return (x if norm is None else norm(x)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dim = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    head, tail = x[..., :dim], x[..., dim:]
    a, b = head.chunk(2, -1)
    return torch.cat([head * cos + torch.cat([-b, a], -1) * sin, tail], -1)
