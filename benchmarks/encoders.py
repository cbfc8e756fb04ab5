"""Speed of merging inside encoders: ratios within one run, random weights, published shapes.

    python benchmarks/encoders.py                                # all shapes
    python benchmarks/encoders.py --only deit --r 13 --out encoders.json

For every shape and r the contestants run in turns: the unpatched encoder, ToMe, and the same lengths cut off
without matching (`cut`), which costs what the shorter sequence costs and nothing else. Reported are the
speed-up and the promise of the multiply-adds, and the cost of merging: (ToMe - cut) / unpatched. `--reference
DIR` adds the published implementation from a checkout of its repository, on models of timm.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtoken
from vtoken.bench.report import machine

SHAPES: dict[str, tuple[str, str, int]] = {  # name: library, model, image size in px
    "deit-s": ("timm", "deit_small_patch16_224", 224),
    "vit-b": ("timm", "vit_base_patch16_224", 224),
    "vit-l": ("timm", "vit_large_patch16_224", 224),
    "clip-l-336": ("open_clip", "ViT-L-14-336", 336),
}
LEAST_SPEED, MOST_COST = 0.85, 0.05  # goals: of the promised speed-up, and of the unpatched forward


def cut(model: Any, x: Tensor, r: int) -> Callable[[], Any]:
    """The encoder's layers in halves on sequences that lose r tokens between them."""
    from vtoken.adapters.encoders.encoder import encoder_for

    encoder = encoder_for(model)
    assert encoder is not None
    shape = encoder.shape(encoder.grid[0] * encoder.grid[1])
    plan = vtoken.strategies.ToMe(r=r).encoder_plan(shape)

    def halves(i: int, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        heads = layer.heads(x, {})
        x = x + layer.mixed(heads.attend(layer.scale, None), heads)
        x = x[:, : x.shape[1] - plan[i]]
        return x + layer.mlp(x)

    def call() -> Any:
        for i, layer in enumerate(encoder.layers):
            layer.module.forward = lambda x, *a, i=i, layer=layer, **k: halves(i, layer, x)
        try:
            return forward(model, x)
        finally:
            for layer in encoder.layers:
                del layer.module.forward

    return call


def forward(model: Any, x: Tensor) -> Any:
    return model.encode_image(x) if hasattr(model, "encode_image") else model(x)


def patched(model: Any, x: Tensor, r: int) -> Callable[[], Any]:
    mine = vtoken.patch(copy.deepcopy(model), "tome", r=r)
    return lambda: forward(mine, x)


def published(name: str, x: Tensor, r: int, folder: Path) -> Callable[[], Any]:
    """ToMe's own patch of a timm model, from a checkout."""
    import timm

    sys.path.insert(0, str(folder))
    import tome

    model = timm.create_model(name).to(x.device, x.dtype).eval()
    tome.patch.timm(model)
    model.r = r
    return lambda: model(x)


def build(library: str, name: str, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    if library == "timm":
        import timm

        return timm.create_model(name).to(device, dtype).eval()
    import open_clip

    config = open_clip.get_model_config(name)
    config["text_cfg"] |= {"layers": 1}  # not timed
    return open_clip.CLIP(**config).to(device, dtype).eval()


def clock(call: Callable[[], Any], device: str, now: Callable[[], float]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = now()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return now() - start


def measure(
    field: dict[str, Callable[[], Any]], device: str, repeats: int, now: Any
) -> dict[str, list[float]]:
    """Seconds of every contestant, in turns, after one turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in field}
    for turn in range(repeats + 1):
        for name, call in field.items():
            spent = clock(call, device, now)
            if turn:
                times[name].append(spent)
    return times


def case(shape: str, r: int, args: argparse.Namespace, now: Callable[[], float]) -> dict[str, Any]:
    library, name, size = SHAPES[shape]
    dtype = getattr(torch, args.dtype)
    model = build(library, name, args.device, dtype)
    x = torch.randn(args.batch, 3, size, size, device=args.device, dtype=dtype)
    field = {"unpatched": lambda: forward(model, x), "tome": patched(model, x, r), "cut": cut(model, x, r)}
    if args.reference and library == "timm":
        field["published"] = published(name, x, r, args.reference)
    times = measure(field, args.device, args.repeats, now)
    vtoken.patch(model, "tome", r=r)
    forward(model, x)
    report = vtoken.report(model)

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))

    promise = report.gflops_dense / report.gflops
    made = {
        "batch": args.batch,
        "seconds": {n: statistics.median(t) for n, t in times.items()},
        "promise": promise,
        "speed-up": ratio("unpatched", "tome"),
        "speed-up / promise": ratio("unpatched", "tome") / promise,
        "cost of merging": ratio("tome", "unpatched") - ratio("cut", "unpatched"),
    }
    return made | ({"published / tome": ratio("published", "tome")} if "published" in field else {})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, on a busy CPU"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--r", type=lambda s: [int(n) for n in s.split(",")], default=[8, 13])
    parser.add_argument("--only", default="", help="only shapes whose name contains this")
    parser.add_argument("--reference", type=Path, help="checkout of facebookresearch/ToMe")
    parser.add_argument(
        "--out", type=Path, help="write the results as JSON here; a file that exists gains cases"
    )
    args = parser.parse_args()
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    report: dict[str, Any] = {"machine": machine(torch.device(args.device)), "cases": {}}
    report |= {"dtype": args.dtype, "clock": args.clock}
    if args.out and args.out.exists():
        report["cases"] = json.loads(args.out.read_text())["cases"]
    with torch.inference_mode():
        for shape in [s for s in SHAPES if args.only in s]:
            for r in args.r:
                made = report["cases"][f"{shape} r={r}"] = case(shape, r, args, now)
                said = ", ".join(f"{k} {v:.3f}" for k, v in made.items() if isinstance(v, float))
                missed = made["speed-up / promise"] < LEAST_SPEED or made["cost of merging"] > MOST_COST
                print(f"{shape} r={r}: {said}{'  (misses a goal)' if missed else ''}", flush=True)
                if args.out:
                    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
