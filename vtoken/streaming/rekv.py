"""ReKV: a stream's KV cache in frame blocks, from which a question retrieves the relevant ones.

ReKV, "Streaming Video Question-Answering with In-context Video KV-Cache Retrieval", arXiv 2503.00540.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import checked
from ..mechanism.attention_rows import rotate
from ..mechanism.transformers_names import cache_argument
from .layers import Layers
from .memory import Step, thinnest
from .prompts import PromptInputs, Prompts


@dataclass(eq=False)
class Block:
    """KV cache entries and facts of one step of a stream.

    Attributes:
        step: the step, without its features.
        kv: (layers, 2, kv_heads, n, head_dim), keys before their rotation and values, on the CPU or mapped
            from a file.
        mean: (layers, kv_heads, head_dim) float32, mean key.
        change: see `Step.change`; deleted predecessors add theirs.
    """

    step: Step
    kv: Tensor
    mean: Tensor
    change: float

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + self.mean.nbytes + self.step.nbytes

    @property
    def seconds(self) -> tuple[float, ...]:
        return self.step.seconds


@dataclass(eq=False)
class Context:
    """The tokens that the LLM has read so far and still attends to.

    Attributes:
        window, sinks: per layer keys and values (1, kv_heads, n, head_dim), keys before their rotation.
        prefix: (n,) int64, the prompt's beginning, None before the first frame.
        seen: number of tokens read.
    """

    window: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    sinks: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    prefix: Tensor | None = None
    seen: int = 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for pair in (*self.sinks, *self.window) for t in pair)


@dataclass(eq=False)
class Prepared:
    """A block that the memory may take, and the LLM's context after it."""

    block: Block
    context: Context


class ReKVMemory:
    """Sliding-window prefill of all steps, blocks in CPU memory or files, retrieval per question and layer.

    A step attends to the `n_local` tokens up to it and to the prompt's beginning (attention sinks), at a
    distance of at most `n_local - 1`. At a question each LLM layer takes the `topk` blocks whose mean key has
    the largest product with the question's mean query, in the order of time; sinks and blocks get positions
    0, 1, 2, ... and the prompt's end continues them, through the model's own `generate`. Differences from the
    published code: a sink is not counted twice while it is in the window, the end of a video (`Step.tail`)
    stays in the prompt, a short last group is filled up, `n_local` does not limit the answer, and the blocks
    are bounded: if a new one does not fit, the one with the least change is deleted as in `RecentMemory`.

    Args:
        layers: the LLM.
        prompts: the maker of prompts.
        max_bytes: upper bound of the bytes of blocks, window and sinks.
        n_local: tokens of the window.
        topk: number of blocks that a layer takes.
        chunk: number of blocks that are scored and taken together; divides `topk`.
        metric: "dot" as published, or "cosine".
        disk: directory for the blocks' keys and values, None for CPU memory. `max_bytes` counts them in both
            cases.

    Raises:
        ValueError: for values out of range.
    """

    @checked
    def __init__(
        self,
        layers: Layers,
        prompts: Prompts,
        max_bytes: int,
        n_local: int = 15000,
        topk: int = 64,
        chunk: int = 1,
        metric: Literal["dot", "cosine"] = "dot",
        disk: str | os.PathLike[str] | None = None,
    ) -> None:
        if topk < 1 or chunk < 1 or topk % chunk:
            raise ValueError(f"topk must be a positive multiple of chunk, found {topk} and {chunk}.")
        for name, value in (("n_local", n_local), ("max_bytes", max_bytes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}.")
        if disk is not None and not Path(disk).is_dir():
            raise ValueError(f"disk must be a directory, found {str(disk)!r}.")
        self.layers, self.prompts, self.max_bytes = layers, prompts, max_bytes
        self.n_local, self.topk, self.chunk, self.metric, self.disk = n_local, topk, chunk, metric, disk
        self.reset()

    def reset(self) -> None:
        self.blocks: list[Block] = []
        self.context = Context()
        self.forgotten = self._block_bytes = 0

    @property
    def nbytes(self) -> int:
        return self._block_bytes + self.context.nbytes

    @property
    def max_tokens(self) -> int | None:
        """Visual tokens of a prompt; None before the first frame."""
        return self.topk * len(self.blocks[-1].step.kept) if self.blocks else None

    @property
    def visual_tokens(self) -> int:
        """Visual tokens in the blocks."""
        return sum(len(b.step.kept) for b in self.blocks)

    # -- frames ----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def prepare(self, step: Step) -> Prepared:
        """Prefill the next step and write its block, if there is a disk; the memory does not change.

        Raises:
            ValueError: if the step is longer than the window, or than the previous step.
            OSError: if the block cannot be written; no file is left.
        """
        tokens = len(step.kept)
        if tokens > self.n_local:
            raise ValueError(
                f"A step of {tokens} tokens is longer than the window of {self.n_local}: raise n_local."
            )
        if self.blocks and tokens != len(self.blocks[-1].step.kept):
            raise ValueError(
                f"memory='rekv' needs blocks of one length, found {tokens} tokens after"
                f" {len(self.blocks[-1].step.kept)}: use a strategy that keeps as much of every frame."
            )
        context = self.context
        if context.prefix is None:
            prefix = self.prompts.around("?")[0]
            context = self._read(self.layers.embed(prefix), context)[1]
            context = replace(
                context, prefix=prefix, sinks=[(k.clone(), v.clone()) for k, v in context.window]
            )
        made, context = self._read(step.features[None].to(self.layers.device), context)
        kv = torch.stack([torch.stack([k[0], v[0]]) for k, v in made]).cpu()
        mean = torch.stack([k[0].float().mean(1) for k, _ in made])
        if self.disk is not None:
            kv = _to_file(kv, self.disk)
        bare = replace(step, features=step.features[:0].clone(), deepstack=None)
        return Prepared(Block(bare, kv, mean, step.change), context)

    def add(self, prepared: Prepared) -> None:
        """Add a prepared block; raises ValueError, without any change, if it alone does not fit."""
        blocks = [*self.blocks, prepared.block]
        held, forgotten = self._block_bytes + prepared.block.nbytes, self.forgotten
        while prepared.context.nbytes + held > self.max_bytes:
            if len(blocks) == 1:
                raise ValueError(
                    f"The window, the sinks and one block take {prepared.context.nbytes + held} bytes and"
                    f" max_bytes is {self.max_bytes}: raise max_bytes or lower n_local."
                )
            place = thinnest([b.change for b in blocks], 0, len(blocks) - 1)
            gone = blocks.pop(place)
            blocks[place] = replace(blocks[place], change=blocks[place].change + gone.change)
            held -= gone.nbytes
            forgotten += 1
        self.blocks, self.context = blocks, prepared.context
        self._block_bytes, self.forgotten = held, forgotten

    def _read(self, hidden: Tensor, context: Context) -> tuple[list[tuple[Tensor, Tensor]], Context]:
        """Prefill tokens after a context: their keys and values per layer, and the context after them."""
        made: list[tuple[Tensor, Tensor]] = []
        window, sinks, seen = context.window, context.sinks, context.seen
        piece, past = hidden.shape[1], window[0][0].shape[2] if window else 0
        total = past + piece
        position = torch.arange(total, device=hidden.device)
        distance = position[past:, None] - position[None]
        local = (distance >= 0) & (distance < self.n_local)
        tables = self.layers.tables(hidden, position)
        far = None
        if sinks and seen + piece > self.n_local:
            ends = torch.tensor([0, self.n_local - 1], device=hidden.device)
            at = [tuple(t[:, i : i + 1] for t in self.layers.tables(hidden, ends)) for i in (0, 1)]
            n_init = sinks[0][0].shape[2]
            first = torch.arange(n_init, device=hidden.device)
            away = seen + torch.arange(piece, device=hidden.device)[:, None] - first[None] >= self.n_local
            far = at[0], at[1], torch.cat([away, local], 1)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            made.append((k, v))
            if window:
                k, v = (torch.cat([old, new], 2) for old, new in zip(window[i], (k, v), strict=True))
            near_q = rotate(q, *(t[:, past:] for t in tables))
            near_k = rotate(k, *tables)
            if far is None:
                return self.layers.sdpa(i, near_q, near_k, v, local)
            # sinks need another rotation of the query: both side by side, each with zeros in the other's keys
            at_zero, ceiling, mask = far
            sink_k, sink_v = sinks[i]
            sink_k = rotate(sink_k, *at_zero)
            both_q = torch.cat([near_q, rotate(q, *ceiling)], -1)
            zero = torch.zeros_like
            both_k = torch.cat(
                [torch.cat([zero(sink_k), sink_k], -1), torch.cat([near_k, zero(near_k)], -1)], 2
            )
            return self.layers.sdpa(i, both_q, both_k, torch.cat([sink_v, v], 2), mask)

        self.layers.run(hidden, attend)
        before = window or [(k[:, :, :0], v[:, :, :0]) for k, v in made]
        moved: Any = [
            tuple(
                torch.cat([old, new], 2)[:, :, -self.n_local :].clone() for old, new in zip(a, b, strict=True)
            )
            for a, b in zip(before, made, strict=True)
        ]
        return made, replace(context, window=moved, seen=seen + piece)

    # -- questions -------------------------------------------------------------------------------------------
    def view(self, t: float | None = None) -> list[Block]:
        """The blocks with all frames at or before time `t` (seconds; None for all), in time order."""
        return [b for b in self.blocks if t is None or b.seconds[-1] <= t]

    def select(self, query: Tensor, means: Tensor) -> Tensor:
        """Ascending indices of the blocks that one layer takes: always `topk`, all if there are no more.

        If the last group is short and is taken, the first blocks of the next best group fill it up.

        Args:
            query: (H, D) float32, the question's mean query before rotation.
            means: (blocks, kv_heads, D) float32.
        """
        count = len(means)
        if count <= self.topk:
            return torch.arange(count)
        query = query.view(means.shape[1], -1, query.shape[-1])
        if self.metric == "cosine":  # of the heads side by side, key heads repeated
            query = query / query.norm()
            means = means / (means.flatten(1).norm(dim=1)[:, None, None] * query.shape[1] ** 0.5)
        scores = torch.einsum("gqd,bgd->b", query, means)
        groups = torch.arange(count, device=scores.device) // self.chunk
        size = torch.bincount(groups)
        scores = torch.zeros(len(size), device=scores.device).index_add_(0, groups, scores) / size
        best = scores.sort(descending=True, stable=True).indices[: self.topk // self.chunk + 1].cpu()
        taken = (best[:, None] * self.chunk + torch.arange(self.chunk)[None]).flatten()
        return taken[taken < count][: self.topk].sort().values

    @torch.no_grad()
    def inputs(self, question: str, blocks: Sequence[Block]) -> PromptInputs:
        """A prompt whose beginning is cached: the sinks, and the blocks that each layer took of `blocks`."""
        from transformers import DynamicCache

        prefix, suffix, tail = self.prompts.around(question)
        if self.context.prefix is None or not torch.equal(prefix, self.context.prefix):
            raise ValueError(
                "memory='rekv' reads frames before it knows the question: use a prompt with {frames} first."
            )
        hidden = self.layers.embed(self.prompts.ids_of(question))
        cache, used = DynamicCache(config=self.layers.decoder.config), set()
        visual = 0

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal visual
            taken = self.select(q[0].float().mean(1), torch.stack([b.mean[i] for b in blocks])).tolist()
            used.update(taken)
            own = torch.cat([blocks[b].kv[i] for b in taken], 2).to(q.device)
            context_k, context_v = (
                torch.cat([s, x[None]], 2) for s, x in zip(self.context.sinks[i], own, strict=True)
            )
            visual = own.shape[2]
            n, m = context_k.shape[2], k.shape[2]
            cos, sin = self.layers.tables(q, torch.arange(n + m))
            context_k = rotate(context_k, cos[:, :n], sin[:, :n])
            cache.update(context_k, context_v, i)
            now = cos[:, n:], sin[:, n:]
            mask = torch.ones(m, n + m, dtype=torch.bool, device=q.device).tril(n)
            keys, values = torch.cat([context_k, rotate(k, *now)], 2), torch.cat([context_v, v], 2)
            return self.layers.sdpa(i, rotate(q, *now), keys, values, mask)

        self.layers.run(hidden, attend)
        end = blocks[-1].step
        tail = tail[: 0 if end.tail is None else len(end.tail)]
        context = torch.cat([prefix, prefix.new_full((visual,), int(suffix[-1]))])
        whole = torch.cat([context, tail, suffix])[None].to(self.layers.device)
        arguments: dict[str, Any] = {
            "input_ids": whole,
            "attention_mask": torch.ones_like(whole),
            cache_argument(self.layers.decoder.forward): cache,
        }
        frames = self.prompts.frames
        if len(tail):
            arguments["mm_encoder_outputs"] = {frames.modality: frames.features_of([end])}
        seen = torch.zeros(whole.shape[1], dtype=torch.bool)
        seen[len(prefix) : len(prefix) + visual + len(tail)] = True
        times = tuple(s for b in sorted(used) for s in blocks[b].seconds)
        return PromptInputs(arguments, seen, times)


def _to_file(kv: Tensor, folder: str | os.PathLike[str]) -> Tensor:
    """Map keys and values from a file without a name, which is deleted after its last use."""
    kv = kv.contiguous()
    try:
        handle, path = tempfile.mkstemp(suffix=".kv", dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(kv.view(-1).view(torch.uint8).numpy().data)
            return torch.from_file(path, shared=False, size=kv.numel(), dtype=kv.dtype).view(kv.shape)
        finally:
            Path(path).unlink()  # POSIX keeps mapped files
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"{kv.nbytes} bytes of a frame could not be written ({why}): free some space, or pass another"
            " `disk`",
            str(folder),
        ) from error
