"""Trains a tiny vision-language model by its recipe: ``python -m training.tiny.train llava``.

No visual token is ever dropped in training. On glibc systems the environment variables
``MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=16000000000`` save about a fifth of the time on a
CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers

from vtoken.tiny.questions import answers, held_out, score

from . import recipes
from .card import draw


def train(
    name: str = "llava",
    out: str | Path = "tiny-llava",
    minutes: float | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    questions: int = 500,
) -> dict[str, Any]:
    """Train, measure and save a tiny model with its processor, log, curve and model card.

    Args:
        name: one of `recipes.names()`.
        out: folder to write; made if missing. ``out/stages`` keeps the state of each stage while it runs.
        minutes: upper limit of the training time; the schedules shrink to fit. ``None``: the full recipe.
        device: ``cpu``, ``cuda`` or ``auto``.
        seed: of the weights and the scenes.
        resume: continue from the state of an interrupted run in ``out/stages``.
        questions: held-out questions of the final measurement.

    Returns:
        The report that is also written to ``training_log.json`` (without the step log).
    """
    recipe = recipes.recipe(name)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    keep = stages(Path(out), resume)
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    workers = min(8, os.cpu_count() or 1) if device == "cuda" else 0
    model, processor = recipe.build()
    model.to(device).train()
    log: list[dict] = []
    recipe.train(model, processor, log, seed, seconds=minutes and minutes * 60, workers=workers, keep=keep)
    return finish(recipe, model, processor, log, seed, Path(out), questions)


def finish(
    recipe: ModuleType, model: Any, processor: Any, log: list[dict], seed: int, out: Path, questions: int
) -> dict[str, Any]:
    """Save model and processor, measure them, write log, curve and card; returns the report."""
    model.eval()
    # stored in bfloat16 and computed in float32: half the bytes, and the same answers
    state = {name: t.bfloat16() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    model.save_pretrained(out, state_dict=state)
    processor.save_pretrained(out)
    trained = list(dict.fromkeys(entry["stage"] for entry in log))
    spent = {stage: max(e["seconds"] for e in log if e["stage"] == stage) for stage in trained}
    name = recipe.__name__.rpartition(".")[2]
    pairs = held_out(name, questions)
    report = {
        "model": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_minutes": round(sum(spent.values()) / 60, 1),
        "machine": torch.cuda.get_device_name() if model.device.type == "cuda" else cores(),
        "versions": versions(),
        "questions": questions,
        "accuracy": score(pairs, answers(model, processor, pairs)),
        **recipe.measure(model, processor, questions),
    }
    (out / "training_log.json").write_text(json.dumps({**report, "steps": log}, indent=1) + "\n")
    (out / "README.md").write_text(recipe.card(report, log))
    draw(out / "curve.png", log)
    return report


def stages(out: Path, resume: bool) -> Path:
    """The folder ``out/stages`` for the state of a run, made if missing; emptied unless a run goes on."""
    keep = out / "stages"
    keep.mkdir(parents=True, exist_ok=True)
    if not resume:
        for state in keep.glob("*.safetensors"):
            state.unlink()
    return keep


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that train."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cores() -> str:
    """``1 CPU core``, ``2 CPU cores``: the number of threads of torch."""
    n = torch.get_num_threads()
    return f"{n} CPU core{'s' * (n > 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.tiny.train", description=train.__doc__.splitlines()[0]
    )
    parser.add_argument("name", choices=recipes.names())
    parser.add_argument("--out", default=None, help="folder to write (default: tiny-NAME)")
    parser.add_argument("--minutes", type=float, default=None, help="upper limit of the training time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from what an interrupted run left")
    args = parser.parse_args()
    report = train(
        args.name, args.out or f"tiny-{args.name}", args.minutes, args.device, args.seed, args.resume
    )
    print(json.dumps({k: report[k] for k in ("accuracy", "training_minutes")}, indent=1))


if __name__ == "__main__":
    main()
