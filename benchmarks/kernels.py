"""Kernels compared with their torch twins, the usual code, and the copy bandwidth of the device.

All are in one run: only ratios between times of the same run are worth quoting.

    python benchmarks/kernels.py                        # shapes of 7B models on a GPU, scaled ones on a CPU
    python benchmarks/kernels.py --shape small --out kernels.json

How far the contestants of a case differ in their answers is measured first; then they are timed in turns (A B
C A B C ...), by CUDA events on a GPU and by the wall clock on a CPU. Reported are medians, and the median and
quartiles of the ratio of neighbouring runs. On a CPU the times mean little while other work runs: the load is
part of the report.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_cases import SHAPES, Call, Inputs
from torch import Tensor

from vtoken import kernels
from vtoken.bench.report import machine, save
from vtoken.bench.timing import spread

BASE = "torch"  # the twin, the reference for the others' answers


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in flat(v)]


def differ(a: Any, b: Any) -> float:
    """Largest difference relative to the largest value; for picked tokens the share of differing picks."""
    worst = 0.0
    for x, y in zip(flat(a), flat(b), strict=True):
        if x.dtype == torch.long:
            x, y = x.flatten(0, -2).sort().values, y.flatten(0, -2).sort().values
            worst = max(
                worst,
                sum(len(set(p) - set(q)) for p, q in zip(x.tolist(), y.tolist(), strict=True)) / x.numel(),
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


def clock(call: Call, cuda: bool, now: Callable[[], float]) -> float:
    """Milliseconds of one call; on a CPU by the clock `now`."""
    if not cuda:
        start = now()
        call()
        return 1e3 * (now() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # the launches queue up after it, so that short kernels are not timed by the host
    torch.cuda._sleep(1_000_000)
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


def measure(
    call: Call, usual: Call, nbytes: int, device: torch.device, repeats: int, now: Callable[[], float]
) -> dict[str, Any]:
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
            spent = clock(run, cuda, now)
            if turn >= 2:
                times[name].append(spent)

    def ratio(over: str, under: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(times[over], times[under], strict=True)])

    best = "triton" if cuda else BASE
    result: dict[str, Any] = {
        "ms": {name: statistics.median(t) for name, t in times.items()},
        "difference": agreement,
    }
    result["usual / vtoken"] = ratio("usual", best)
    result["torch / triton"] = ratio(BASE, "triton") if cuda else None
    result["share of copy bandwidth"] = ratio("copy", best) if nbytes else None
    result["extra bytes"] = memory
    result["output bytes"] = sum(t.untyped_storage().nbytes() for t in flat(wanted))
    return result


def goals(results: dict[str, dict[str, Any]], cuda: bool) -> dict[str, dict[str, Any]]:
    """The goals of the kernels, and whether this run reached them."""
    wanted: dict[str, tuple[float, float]] = {}
    for name, result in results.items():
        if "failed" in result:
            continue
        if not cuda:
            wanted[f"{name}: usual / twin at least"] = (result["usual / vtoken"]["median"], 1.0)
        elif name in ("gather", "gather_merge"):
            wanted[f"{name}: share of copy bandwidth at least"] = (
                result["share of copy bandwidth"]["median"],
                0.85,
            )
        elif name.startswith("attention_rows"):
            wanted[f"{name}: usual / Triton at least"] = (result["usual / vtoken"]["median"], 3.0)
            spare = 1 - result["extra bytes"]["triton"] / result["output bytes"]
            wanted[f"{name}: 1 - extra / output bytes at least"] = (spare, 0.99)
    return {
        name: {"value": value, "goal": goal, "reached": value >= goal}
        for name, (value, goal) in wanted.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=[*SHAPES], help="7b on a GPU, small on a CPU, if not given")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, on a busy CPU"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds of each case")
    parser.add_argument("--only", default="", help="only cases whose name matches this expression")
    parser.add_argument(
        "--out", type=Path, help="write the results as JSON here; a file that exists gains cases"
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    about = machine(device) | {"clock": args.clock}
    shape = args.shape or ("7b" if device.type == "cuda" else "small")
    report: dict[str, Any] = {"machine": about, "shape": shape, "shapes": SHAPES[shape], "cases": {}}
    if args.out and args.out.exists():
        report["cases"] = json.loads(args.out.read_text())["cases"]
    failed = False
    print(f"{report['machine']['device']}, torch {torch.__version__}, shape {shape}")
    if device.type != "cuda":
        print("No GPU: the torch twins against the usual way; Triton is not timed.")
    with torch.no_grad():
        for name, (call, usual, nbytes) in Inputs(SHAPES[shape], device).all().items():
            if not re.search(args.only, name):
                continue
            try:
                result = report["cases"][name] = measure(call, usual, nbytes, device, args.repeats, now)
            except Exception as error:  # one kernel that a device cannot run must not lose the others
                failed, report["cases"][name] = True, {"failed": f"{type(error).__name__}: {error}"[:500]}
                print(f"{name:40s} FAILED {error}", flush=True)
                continue
            finally:
                report["goals"] = goals(report["cases"], device.type == "cuda")
                if args.out:
                    save(report, args.out)
            parts = [f"{k} {v:.3f} ms" for k, v in result["ms"].items()]
            for label in ("usual / vtoken", "torch / triton", "share of copy bandwidth"):
                if r := result[label]:
                    parts.append(f"{label} {r['median']:.2f} [{r['q1']:.2f}, {r['q3']:.2f}]")
            print(f"{name:40s} " + "  ".join(parts), flush=True)
    for name, goal in report["goals"].items():
        print(f"{'reached' if goal['reached'] else 'MISSED ':8s} {name} {goal['goal']}: {goal['value']:.2f}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
