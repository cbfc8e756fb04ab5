"""Kernels against their torch twins, against what is usually written (the eager N x N way), and against the copy
bandwidth of the device, all in one run: only ratios between times of the same run are worth quoting.

    python benchmarks/kernels.py                        # shapes of 7B models on a GPU, scaled ones on a CPU
    python benchmarks/kernels.py --shape small --out kernels.json

How far the contestants of a case differ in their answers is measured first; then they are timed in turns (A B C A B C
...), by CUDA events on a GPU and by the wall clock on a CPU. Reported are medians, and the median and quartiles of the
ratio of neighbouring runs. On a CPU the times mean little while other work runs: the load is part of the report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtoken import kernels

Call = Callable[[], Any]
Case = tuple[Call, Call, int]
BASE = "torch"  # what ratios refer to
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "small": {
        "merge": (1, 576, 1024, 115), "cls": (3, 8, 145, 32), "text": (1, 8, 320, 64), "tower": (2, 8, 256, 32),
        "windows": (1, 8, 1024, 32), "tome": (2, 257, 64, 32), "select": (1, 576, 1024, 115), "kv": (4, 1, 4, 640, 64, 160),
    },
    "7b": {
        "merge": (8, 2880, 4096, 576), "cls": (5, 16, 577, 64), "text": (1, 32, 2944, 128), "tower": (5, 16, 729, 72),
        "windows": (1, 16, 5184, 80), "tome": (8, 577, 64, 64), "select": (1, 2880, 4096, 576),
        "kv": (32, 1, 32, 2944, 128, 640),
    },
}  # fmt: skip


def softmax_map(q: Tensor, k: Tensor, hidden: Tensor | None = None) -> Tensor:
    """The whole map, as eager attention computes it."""
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return (logits if hidden is None else logits.masked_fill(hidden, -torch.inf)).softmax(-1, dtype=torch.float32)


def naive_merge(x: Tensor, index: Tensor, into: Tensor, weight: Tensor) -> Tensor:
    """A gather, then a scatter of every weighted row into a float32 copy."""
    wide = torch.zeros(x.shape[0], index.shape[1], x.shape[2], device=x.device)
    wide.scatter_add_(1, into[..., None].expand_as(x), x.float() * weight[..., None])
    return wide.to(x.dtype)


def naive_farthest(x: Tensor, k: int) -> Tensor:
    """DivPrune as published: the distance matrix, and at each step the minimum over all rows chosen so far."""
    unit = torch.nn.functional.normalize(x[0].float(), dim=-1)
    distance = 1 - unit @ unit.mT
    chosen = [(distance + torch.diag(torch.full((len(unit),), torch.inf, device=x.device))).amin(1).argmax()]
    for _ in range(k - 1):
        reach = distance[torch.stack(chosen)].amin(0)
        reach[torch.stack(chosen)] = -torch.inf
        chosen.append(reach.argmax())
    return torch.stack(chosen)[None]


def naive_greedy(x: Tensor, quality: Tensor, k: int) -> Tensor:
    """Greedy MAP on the whole kernel matrix."""
    unit = torch.nn.functional.normalize(x[0].float(), dim=-1)
    kernel = quality[0][:, None] * (unit @ unit.mT) * quality[0]
    left, rows, chosen = kernel.diagonal().clone(), kernel.new_zeros(k, len(unit)), []
    for t in range(k):
        pick = left.argmax()
        rows[t] = (kernel[pick] - rows[:t, pick] @ rows[:t]) / left[pick].sqrt()
        left = left - rows[t] ** 2
        left[pick] = -torch.inf
        chosen.append(pick)
    return torch.stack(chosen)[None]


def naive_match(keys: Tensor, r: int) -> Tensor:
    """ToMe's matching as published: sources, their targets, and the sorted rest (which the comparison leaves out)."""
    unit = keys.float() / keys.float().norm(dim=-1, keepdim=True)
    best, partner = (unit[:, 2::2] @ unit[:, 1::2].mT).max(-1)
    order = best.argsort(dim=-1, descending=True)
    order, _rest = order[:, :r], order[:, r:].sort(-1).values
    return torch.stack([2 + 2 * order, 1 + 2 * partner.gather(1, order)])


class Inputs:
    """Random inputs; a case is a call of vtoken's kernel, the usual way, and the bytes that have to move (0: no claim)."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device):
        self.shapes, self.device = shapes, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.generator = torch.Generator(device).manual_seed(0)

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(self.dtype)

    def share(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def some(self, batch: int, n: int, m: int) -> Tensor:
        return self.share(batch, n).argsort(1)[:, :m].sort(1).values

    def moving(self) -> dict[str, Case]:
        batch, n, d, m = self.shapes["merge"]
        x, index, weight = self.rand(batch, n, d), self.some(batch, n, m), self.share(batch, n)
        into = torch.randint(m, (batch, n), generator=self.generator, device=self.device)
        planes = [x, torch.arange(batch * n, device=self.device).view(batch, n), x[..., 0] > 0]
        row = d * x.element_size() * batch

        def gather(p: Tensor) -> Tensor:
            return p.gather(1, index.view(batch, m, *[1] * (p.ndim - 2)).expand(batch, m, *p.shape[2:]))

        return {
            "gather": (lambda: kernels.gather_merge(x, index), lambda: gather(x), 2 * m * row),
            "gather_merge": (
                lambda: kernels.gather_merge(x, index, into, weight),
                lambda: naive_merge(x, index, into, weight),
                (n + m) * row,
            ),
            "gather_rows": (
                lambda: kernels.gather_rows(planes, index), lambda: [gather(p) for p in planes], 2 * m * (row + 9 * batch)
            ),
        }  # fmt: skip

    def attention_rows(self, name: str, first: int | None, last: int | None, reduce: str | None) -> Case:
        batch, heads, n, d = self.shapes[name]
        q, k = self.rand(batch, heads, n, d), self.rand(batch, heads, n, d)
        rows = slice(first, last)

        def usual() -> Tensor:
            seen = softmax_map(q, k)[:, :, rows]
            return seen.mean((1, 2)) if reduce else seen.clone()

        return lambda: kernels.attention_rows(q[:, :, rows], k, reduce=reduce), usual, 0

    def received(self, name: str, side: int | None) -> Case:
        batch, heads, n, d = self.shapes[name]
        q, k = self.rand(batch, heads, n, d), self.rand(batch, heads, n, d)
        cuts = torch.arange(0, n + 1, side or n, device=self.device)
        window = torch.arange(n, device=self.device) // (side or n)
        hidden = window[:, None] != window if side else None

        def usual() -> Tensor:
            return softmax_map(q, k, hidden).sum((1, 2)) / (heads * (side or n))

        return lambda: kernels.received_attention(q, k, cu_seqlens=cuts), usual, 0

    def selecting(self) -> dict[str, Case]:
        batch, n, d, r = self.shapes["tome"]
        keys = self.rand(batch, n, d)
        batch, n, d, k = self.shapes["select"]
        x, quality = self.rand(batch, n, d), self.share(batch, n) + 0.1
        return {
            "bipartite_match": (
                lambda: torch.stack(kernels.bipartite_match(keys, r, 1)[:2]), lambda: naive_match(keys, r), 0
            ),
            "farthest_point": (lambda: kernels.farthest_point(x, k), lambda: naive_farthest(x, k), 0),
            "greedy_map": (lambda: kernels.greedy_map(x, quality, k), lambda: naive_greedy(x, quality, k), 0),
        }  # fmt: skip

    def cache(self) -> Case:
        layers, batch, heads, n, d, m = self.shapes["kv"]
        tensors = [self.rand(batch, heads, n, d) for _ in range(2 * layers)]
        index = self.some(batch, n, m)
        columns = index[:, None, :, None].expand(batch, heads, m, d)
        nbytes = 2 * len(tensors) * batch * heads * m * d * tensors[0].element_size()
        return (
            lambda: kernels.kv_compact(tensors[:layers], tensors[layers:], index),
            lambda: [t.gather(2, columns) for t in tensors], nbytes,
        )  # fmt: skip

    def all(self) -> dict[str, Case]:
        return {
            **self.moving(),
            "attention_rows: CLS": self.attention_rows("cls", 0, 1, None),
            "attention_rows: mean of the last 32": self.attention_rows("text", -32, None, "mean"),
            "received_attention": self.received("tower", None),
            "received_attention: windows of 64": self.received("windows", 64),
            **self.selecting(),
            "kv_compact": self.cache(),
        }


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in flat(v)]


def differ(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value; for picked tokens the share of picks not in common."""
    worst = 0.0
    for x, y in zip(flat(a), flat(b), strict=True):
        if x.dtype == torch.long:
            x, y = x.flatten(0, -2).sort().values, y.flatten(0, -2).sort().values
            worst = max(
                worst, sum(len(set(p) - set(q)) for p, q in zip(x.tolist(), y.tolist(), strict=True)) / x.numel()
            )
        else:
            x, y = x.double(), y.double()
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)))
    return worst


def with_backend(name: str, call: Call) -> Call:
    def run() -> Any:
        with kernels.backend(name):
            return call()

    return run


def clock(call: Call, cuda: bool) -> float:
    """Milliseconds of one call."""
    if not cuda:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)  # the launches queue up behind it, so that short kernels are not timed by the host
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def extra_memory(call: Call) -> int:
    """Bytes held at the peak beyond what stood before and the output itself."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    return torch.cuda.max_memory_allocated() - before - sum(t.untyped_storage().nbytes() for t in flat(out))


def measure(call: Call, usual: Call, nbytes: int, device: torch.device, repeats: int) -> dict[str, Any]:
    cuda = device.type == "cuda"
    field = {BASE: with_backend("torch", call)}
    if cuda:
        field["triton"] = with_backend("triton", call)
    field["usual"] = usual
    wanted = field[BASE]()
    agreement = {name: differ(run(), wanted) for name, run in field.items()}
    memory = {name: extra_memory(run) for name, run in field.items()} if cuda else None
    if nbytes:
        source = torch.empty(nbytes // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        field["copy"] = lambda: target.copy_(source)
    times: dict[str, list[float]] = {name: [] for name in field}
    for turn in range(repeats + 2):
        for name, run in field.items():
            spent = clock(run, cuda)
            if turn >= 2:
                times[name].append(spent)

    def ratio(over: str, under: str) -> dict[str, float]:
        pairs = [a / b for a, b in zip(times[over], times[under], strict=True)]
        low, middle, high = statistics.quantiles(pairs, n=4)
        return {"median": middle, "q1": low, "q3": high}

    best = "triton" if cuda else BASE
    result: dict[str, Any] = {"ms": {name: statistics.median(t) for name, t in times.items()}, "difference": agreement}
    result["usual / vtoken"] = ratio("usual", best)
    result["torch / triton"] = ratio(BASE, "triton") if cuda else None
    result["share of copy bandwidth"] = ratio("copy", best) if nbytes else None
    result["extra bytes"] = memory
    result["output bytes"] = sum(t.untyped_storage().nbytes() for t in flat(wanted))
    return result


def goals(results: dict[str, dict[str, Any]], cuda: bool) -> dict[str, dict[str, Any]]:
    """What the kernels are meant to reach, and whether this run did."""
    wanted: dict[str, tuple[float, float]] = {}
    for name, result in results.items():
        if not cuda:
            wanted[f"{name}: usual / twin at least"] = (result["usual / vtoken"]["median"], 1.0)
        elif name in ("gather", "gather_merge"):
            wanted[f"{name}: share of copy bandwidth at least"] = (result["share of copy bandwidth"]["median"], 0.85)
        elif name.startswith("attention_rows"):
            wanted[f"{name}: usual / Triton at least"] = (result["usual / vtoken"]["median"], 3.0)
            spare = 1 - result["extra bytes"]["triton"] / result["output bytes"]
            wanted[f"{name}: 1 - extra / output bytes at least"] = (spare, 0.99)
    return {name: {"value": value, "goal": goal, "reached": value >= goal} for name, (value, goal) in wanted.items()}


def machine(device: torch.device) -> dict[str, Any]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name, "type": device.type, "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton_version,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=[*SHAPES], help="7b on a GPU, small on a CPU, if not given")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds of each case")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, help="write the results as JSON here")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"quartiles need at least 2 repeats; found {args.repeats}")
    device = torch.device(args.device)
    shape = args.shape or ("7b" if device.type == "cuda" else "small")
    report: dict[str, Any] = {"machine": machine(device), "shape": shape, "shapes": SHAPES[shape], "cases": {}}
    print(f"{report['machine']['device']}, torch {torch.__version__}, shape {shape}")
    if device.type != "cuda":
        print("No GPU: the torch twins against the usual way; Triton is not timed.")
    with torch.no_grad():
        for name, (call, usual, nbytes) in Inputs(SHAPES[shape], device).all().items():
            if args.only not in name:
                continue
            result = report["cases"][name] = measure(call, usual, nbytes, device, args.repeats)
            parts = [f"{k} {v:.3f} ms" for k, v in result["ms"].items()]
            for label in ("usual / vtoken", "torch / triton", "share of copy bandwidth"):
                if r := result[label]:
                    parts.append(f"{label} {r['median']:.2f} [{r['q1']:.2f}, {r['q3']:.2f}]")
            print(f"{name:40s} " + "  ".join(parts), flush=True)
    report["goals"] = goals(report["cases"], device.type == "cuda")
    for name, goal in report["goals"].items():
        print(f"{'reached' if goal['reached'] else 'MISSED ':8s} {name} {goal['goal']}: {goal['value']:.2f}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
