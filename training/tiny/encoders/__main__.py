"""Trains a tiny encoder by its recipe: ``python -m training.tiny.encoders vit``.

No token is ever dropped or merged in training. On glibc systems the environment variables
``MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=16000000000`` make training several times as
fast on a CPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

from ..card import draw
from ..train import cores

NAMES = ("clip", "vit")
PACKAGES = {"clip": "open_clip_torch", "vit": "timm"}


def train(
    name: str,
    out: str | Path,
    minutes: float | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    n: int | None = None,
) -> dict[str, Any]:
    """Train, measure and save a tiny encoder with its log, curve and card.

    Args:
        name: ``clip`` or ``vit``.
        out: folder to write; made if missing. ``out/stages`` keeps the state of each stage while it runs.
        minutes: upper limit of the training time; the schedules shrink to fit. ``None``: the full recipe.
        device: ``cpu``, ``cuda`` or ``auto``.
        seed: of the weights and the pictures.
        resume: continue from the state of an interrupted run in ``out/stages``.
        n: held-out scenes or clips of the final measurement instead of the recipe's number.

    Returns:
        The report that is also written to ``training_log.json`` (without the step log).
    """
    if name not in NAMES:
        raise ValueError(f"unknown tiny encoder {name!r}: the recipes are {', '.join(NAMES)}")
    recipe = importlib.import_module(f"{__package__}.{name}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    keep = Path(out) / "stages"
    keep.mkdir(parents=True, exist_ok=True)
    if not resume:
        for state in keep.glob("*.safetensors"):
            state.unlink()
    torch.manual_seed(seed)
    workers = min(8, os.cpu_count() or 1) if device == "cuda" else 0
    model, preprocess, tokenizer, config = recipe.build()
    model.to(device).train()
    log: list[dict] = []
    recipe.train(
        model, preprocess, tokenizer, log, seed, seconds=minutes and minutes * 60, workers=workers, keep=keep
    )
    return finish(recipe, (model, preprocess, tokenizer, config), log, seed, Path(out), n)


def finish(
    recipe: ModuleType, built: tuple[Any, ...], log: list[dict], seed: int, out: Path, n: int | None
) -> dict[str, Any]:
    """Save the model, measure it, write log, curve and card; returns the report."""
    model, preprocess, tokenizer, config = built
    model.eval()
    # stored in bfloat16 and computed in float32: half the bytes
    state = {name: t.detach().bfloat16().cpu().contiguous() for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    name = recipe.__name__.rpartition(".")[2]
    stages = list(dict.fromkeys(entry["stage"] for entry in log))
    spent = [max(e["seconds"] for e in log if e["stage"] == stage) for stage in stages]
    device = next(model.parameters()).device
    report = {
        "model": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_minutes": round(sum(spent) / 60, 1),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else cores(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", PACKAGES[name])},
        },
        **rounded(recipe.measure(model, preprocess, tokenizer, **({"n": n} if n else {}))),
    }
    (out / "training_log.json").write_text(json.dumps({**report, "steps": log}, indent=1) + "\n")
    (out / "README.md").write_text(recipe.card(report, log))
    draw(out / "curve.png", log)
    return report


def rounded(value: Any) -> Any:
    """Figures to four places, in dictionaries of dictionaries."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.tiny.encoders", description=train.__doc__.splitlines()[0]
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--out", default=None, help="folder to write (default: tiny-NAME)")
    parser.add_argument("--minutes", type=float, default=None, help="upper limit of the training time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from what an interrupted run left")
    args = parser.parse_args()
    report = train(
        args.name, args.out or f"tiny-{args.name}", args.minutes, args.device, args.seed, args.resume
    )
    kept = ("top1", "recalls", "training_minutes")
    print(json.dumps({k: report[k] for k in kept if k in report}, indent=1))


if __name__ == "__main__":
    main()
