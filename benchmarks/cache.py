"""Bytes of the KV cache and time per token of an answer, for every cache strategy beside the full cache.

    python benchmarks/cache.py --out benchmarks/results/cache_cpu.json
    python benchmarks/cache.py --scale full --device cuda --dtype bfloat16 --out cache_gpu.json

Random weights of the shape of `vtoken bench` for Qwen2.5-VL, and a video of as many visual tokens as wanted.
Every strategy reads the prompt once; then all answer in turns, a few tokens each time, from the caches that
they hold, so that a ratio compares neighbours. Bytes are those of 16-bit numbers, whatever the model computes
in.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtoken
from vtoken.asking import quiet
from vtoken.bench.report import save_run
from vtoken.bench.shapes import SHAPES, Workload
from vtoken.bench.timing import cache_bytes, spread
from vtoken.mechanism.packed_cache import PackedLayer
from vtoken.mechanism.transformers_names import cache_argument, cache_in
from vtoken.stage_times import now

SHAPE, PATCHES = "qwen2.5-vl-7b-video", 22  # a frame pair has 22 x 22 patches, 121 visual tokens
TOKENS = {"1k": 8, "4k": 33, "16k": 135}  # frame pairs


def rows(window: int, **evict: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name: strategy and options, for a window of so many tokens and options of `decode_evict`."""
    return {
        "full cache": (None, {}),
        "vidkv": ("vidkv", {}),
        "vidkv, groups of 512": ("vidkv", dict(group=512, residual=512, protect=0)),
        "vidkv, 2 bits": ("vidkv", dict(key_bits=2, value_bits=2)),
        "vidkv, 4 bits": ("vidkv", dict(key_bits=4, value_bits=4)),
        "zipvl": ("zipvl", {}),
        "zipvl, 4 and 2 bits": ("zipvl", dict(kv="quant")),
        "decode_evict, half": ("decode_evict", dict(budget=0.5, **evict)),
        f"sink_window of {window}": ("sink_window", dict(recent=window)),
        "farcover, 25 %": ("farcover", dict(budget=0.25)),
        "farcover, 25 %, vidkv": (["farcover", "vidkv"], dict(budget=0.25)),
    }


ROWS = rows(512, decode_every=2, rounds=1)
FULL = next(iter(ROWS))


@dataclass
class Holder:
    """One row: its cache, and the time of every turn of its answer."""

    name: str
    work: Workload
    cache: Any = None
    last: Tensor | None = None
    times: list[float] = field(default_factory=list)

    def patched(self) -> AbstractContextManager[Any]:
        strategy, options = ROWS[self.name]
        return nullcontext() if strategy is None else vtoken.applied(self.work.model, strategy, **options)

    def read(self) -> None:
        model = self.work.model
        with self.patched():
            out = model(**self.work.inputs, use_cache=True, logits_to_keep=1)
        self.cache, self.last = cache_in(out), out.logits[:, -1:].argmax(-1)

    def answer(self, steps: int) -> None:
        """Read `steps` tokens of an answer."""
        model, device, clock = self.work.model, self.work.model.device, self.work.clock
        call = {cache_argument(type(model).forward): self.cache}
        with self.patched():
            start = now(device, clock)
            for _ in range(steps):
                out = model(input_ids=self.last, **call, use_cache=True)
                self.last = out.logits[:, -1:].argmax(-1)
            self.times.append((now(device, clock) - start) / steps)


def bytes_in_16_bits(cache: Any) -> int:
    """Bytes of the tensors of a cache, floating-point numbers of two bytes each, as LLMs are served."""

    def halved(t: Tensor) -> Tensor:
        return t.to(torch.bfloat16) if t.is_floating_point() else t

    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        if isinstance(layer, PackedLayer):
            layer.each(halved)
        else:
            layer.keys, layer.values = halved(layer.keys), halved(layer.values)
    return cache_bytes(cache)


def workload(scale: str, device: str, dtype: torch.dtype, pairs: int, clock: str) -> Workload:
    shape = SHAPES[SHAPE]
    sized = replace(shape, size={scale: (pairs, PATCHES, PATCHES)})
    return replace(sized.build(SHAPE, scale, device, dtype), clock=clock)


def measure(work: Workload, rows: list[str], turns: int, steps: int) -> list[dict[str, Any]]:
    """Plain numbers of every row; refusals are told."""
    holders: list[Holder] = []
    told: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        for name in rows:
            holder = Holder(name, work)
            try:
                holder.read()
                holder.answer(steps)  # what happens at the first token of an answer
            except (ValueError, NotImplementedError) as refusal:
                told[name] = {"refused": str(refusal)}
                continue
            holder.times.clear()
            holders.append(holder)
        for _ in range(turns):
            for holder in holders:
                holder.answer(steps)
    full = holders[0]
    for holder in holders:
        stored = bytes_in_16_bits(holder.cache)
        told[holder.name] = {
            "bytes": stored,
            "times_fewer_bytes": round(bytes_in_16_bits(full.cache) / stored, 2),
            "ms_per_token": round(1e3 * statistics.median(holder.times), 3),
            "speed": spread([f / t for f, t in zip(full.times, holder.times, strict=True)]),
        }
    return [{"row": name} | told[name] for name in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", default="quick", choices=("tiny", "quick", "cpu", "full"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tokens", nargs="+", default=list(TOKENS), choices=list(TOKENS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS)[1:], choices=list(ROWS)[1:])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="tokens of a turn")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: processor time")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    quiet()
    found = []
    for name in a.tokens:
        work = workload(a.scale, a.device, getattr(torch, a.dtype), TOKENS[name], a.clock)
        for told in measure(work, [FULL, *a.rows], a.turns, a.steps):
            found.append({"tokens": name, "prompt": work.inputs["input_ids"].shape[1], **told})
            print(json.dumps(found[-1]), flush=True)
    save_run(a, torch.device(a.device), rows=found)


if __name__ == "__main__":
    main()
