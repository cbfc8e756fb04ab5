"""Trains a tiny vision-language model from nothing: ``python -m vtoken.tiny.train llava``.

Stage one teaches the tower (`vtoken.tiny.tower`); stage two freezes it and teaches the projector and the language
model (`vtoken.tiny.language`). No visual token is ever dropped in training. On glibc systems the environment variables
``MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=16000000000`` save about a fifth of the time on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader, Dataset

from .evaluate import evaluate, most_frequent, pruned_accuracy
from .language import answer_loss, choose, pack
from .models import BUILDERS
from .optimiser import optimisers
from .scenes import make_scene
from .tower import TowerHeads, hidden_states, localisation, look_loss, targets, to_pixels

TOWER = {"steps": 900, "batch": 32, "rate": 2e-3, "muon_rate": 0.02, "reset": 0.5, "look": 0.5}
LANGUAGE = {"steps": 600, "batch": 32, "rate": 2e-3, "muon_rate": 0.02}
LATER = 50_000_000  # stage two goes on with scenes that stage one has not seen


class Batches(Dataset):
    """One item per training step: the scenes of that step as tensors, a function of ``(seed, step)`` alone."""

    def __init__(self, steps: int, size: int, first: int, vocabulary: dict[str, int] | None = None) -> None:
        self.steps, self.size, self.first, self.vocabulary = steps, size, first, vocabulary

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, Any]:
        start = self.first + step * self.size
        scenes = [make_scene(start + i) for i in range(self.size)]
        if self.vocabulary is None:
            return to_pixels(scenes), targets(scenes)
        rng = np.random.Generator(np.random.PCG64(start))
        return to_pixels(scenes), pack([choose(scene, rng) for scene in scenes], self.vocabulary)


def optimise(
    parameters: dict[str, torch.nn.Parameter],
    batches: Batches,
    loss_of: Callable[[Any, float], tuple[torch.Tensor, dict[str, float]]],
    plan: dict[str, float],
    note: Callable[[int, float, dict[str, float]], None],
    seconds: float | None = None,
    workers: int = 0,
) -> None:
    """Muon and AdamW: 50 warm-up steps, then constant, then linearly down over the last third.

    The way is the number of steps, or ``seconds`` where that comes first.
    """
    used = optimisers(parameters.items(), plan["rate"], plan["muon_rate"])
    groups = [(group, group["lr"]) for optimiser in used for group in optimiser.param_groups]
    began = time.perf_counter()
    for step, item in enumerate(DataLoader(batches, batch_size=None, num_workers=workers)):
        done = step / len(batches)
        if seconds:
            done = max(done, (time.perf_counter() - began) / seconds)
        if done >= 1:
            break
        for group, rate in groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.01 + 0.99 * min(1, 3 * (1 - done)))
        loss, facts = loss_of(item, done)
        for p in parameters.values():
            p.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimiser in used:
            optimiser.step()
        note(step, loss.item(), facts)


def train_tower(
    model: Any, log: list[dict], seed: int = 0, steps: int | None = None, checks: int = 200, **limits: Any
) -> None:
    """Stage one, in place; appends to ``log``. ``checks``: held-out scenes of the measures along the way."""
    plan, device = TOWER, model.device
    tower = model.model.vision_tower
    inner = getattr(tower, "vision_model", tower)
    heads = TowerHeads(model.config.vision_config.hidden_size).to(device)
    check = [make_scene(7_000_000 + i, "test") for i in range(checks)]

    def loss_of(item: Any, done: float = 0) -> tuple[torch.Tensor, dict[str, float]]:
        pixels, goal = item
        goal = {name: value.to(device) for name, value in goal.items()}
        states = hidden_states(tower, pixels.to(device), plan["reset"])
        out = heads(states, goal, inner.post_layernorm)
        shape, colour = out["accuracy"][:2].tolist()
        look = look_loss(tower, states, goal) * plan["look"] if done >= 2 / 3 else 0
        return out["loss"] + look, {"shape": shape, "colour": colour, "cls": out["cls"].mean().item()}

    @torch.no_grad()
    def facts() -> dict[str, float]:
        goal = {name: value.to(device) for name, value in targets(check).items()}
        out = heads(hidden_states(tower, to_pixels(check).to(device)), goal, inner.post_layernorm)
        return {"held_out_shape": out["accuracy"][0].item(), **localisation(tower, check)}

    parameters = {**dict(tower.named_parameters()), **dict(heads.named_parameters(prefix="heads"))}
    batches = Batches(steps or plan["steps"], plan["batch"], seed * 2 * LATER)
    optimise(parameters, batches, loss_of, plan, recorder(log, "tower", facts, len(batches)), **limits)


def train_language(
    model: Any,
    processor: Any,
    log: list[dict],
    seed: int = 0,
    steps: int | None = None,
    checks: int = 100,
    **limits: Any,
) -> None:
    """Stage two, in place, with the tower frozen; arguments as in `train_tower`."""
    plan, device = LANGUAGE, model.device
    vocabulary = processor.tokenizer.get_vocab()
    user = [vocabulary["user"], vocabulary[":"]]
    tower = model.model.vision_tower

    def loss_of(item: Any, done: float = 0) -> tuple[torch.Tensor, dict[str, float]]:
        pixels, (ids, labels) = item
        with torch.no_grad():
            features = hidden_states(tower, pixels.to(device))[model.config.vision_feature_layer][:, 1:]
        loss, accuracy = answer_loss(model, features, ids, labels, user)
        return loss, {"answers": accuracy.item()}

    @torch.no_grad()
    def facts() -> dict[str, float]:
        rng = np.random.Generator(np.random.PCG64(7))
        check = [make_scene(7_000_000 + i, "test") for i in range(checks)]
        item = to_pixels(check), pack([choose(scene, rng) for scene in check], vocabulary)
        loss, accuracy = loss_of(item)
        return {"held_out_loss": loss.item(), "held_out_answers": accuracy["answers"]}

    parameters = {name: p for name, p in model.named_parameters() if "vision_tower" not in name}
    batches = Batches(steps or plan["steps"], plan["batch"], seed * 2 * LATER + LATER, vocabulary)
    optimise(parameters, batches, loss_of, plan, recorder(log, "language", facts, len(batches)), **limits)


def recorder(log: list[dict], stage: str, facts: Callable[[], dict[str, float]], steps: int) -> Callable[..., None]:
    """Notes every 20th step in ``log`` and prints every 100th with ``facts`` (held-out measures)."""
    began = time.perf_counter()

    def note(step: int, loss: float, extra: dict[str, float]) -> None:
        if step % 20 and step != steps - 1:
            return
        entry = {"stage": stage, "step": step, "seconds": time.perf_counter() - began, "loss": loss, **extra}
        if step % 100 == 0 or step == steps - 1:
            entry |= facts()
            print(*(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()), flush=True)
        log.append({k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()})

    return note


def train(
    name: str = "llava",
    out: str | Path = "tiny-llava",
    minutes: float | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    questions: int = 500,
) -> dict[str, Any]:
    """Trains, measures and saves a tiny model with its processor, log, curve and model card.

    Args:
        name: one of ``models.BUILDERS``.
        out: folder to write; made if missing.
        minutes: upper limit of the training time; the schedule shrinks to fit. ``None``: the full recipe.
        device: ``cpu``, ``cuda`` or ``auto``.
        seed: of the weights and the scenes.
        resume: take stage one from ``out/tower.pt`` where an earlier run left it.
        questions: held-out questions of the final measurement.

    Returns:
        The report that is also written to ``training_log.json`` (without the step log).
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown tiny model {name!r}: the recipes are {', '.join(BUILDERS)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    workers = min(8, os.cpu_count() or 1) if device == "cuda" else 0
    model, processor = BUILDERS[name]()
    model.to(device).train()
    log: list[dict] = []
    kept = out / "tower.pt"
    if resume and kept.exists():
        stored = torch.load(kept, map_location=device)
        model.model.vision_tower.load_state_dict(stored["tower"])
        log = stored["log"]
    else:
        train_tower(model, log, seed, seconds=minutes and minutes * 60 * 0.45, workers=workers)
        torch.save({"tower": model.model.vision_tower.state_dict(), "log": log}, kept)
    torch.manual_seed(seed + 1)
    train_language(model, processor, log, seed, seconds=minutes and minutes * 60 * 0.55, workers=workers)
    report = finish(model, processor, log, name, seed, out, questions)
    kept.unlink(missing_ok=True)
    return report


def finish(model: Any, processor: Any, log: list[dict], name: str, seed: int, out: Path, questions: int) -> dict:
    """Saves model and processor, measures them, writes log, curve and card; returns the report."""
    from .card import write_card

    model.eval()
    model.save_pretrained(out)
    processor.save_pretrained(out)
    spent = {stage: max(e["seconds"] for e in log if e["stage"] == stage) for stage in ("tower", "language")}
    report = {
        "model": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_minutes": round(sum(spent.values()) / 60, 1),
        "machine": torch.cuda.get_device_name() if model.device.type == "cuda" else f"{os.cpu_count()} CPU cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "recipe": {"tower": TOWER, "language": LANGUAGE},
        "questions": questions,
        "accuracy": evaluate(model, processor, questions),
        "most_frequent_answer": most_frequent(questions),
        "localisation": localisation(model.model.vision_tower, [make_scene(i, "test") for i in range(500)]),
        "pruned": {
            f"{by} {share}": pruned_accuracy(model, processor, share, by, questions)["all"]
            for by in ("cls", "random")
            for share in (0.5, 0.2, 0.1)
        },
    }
    (out / "training_log.json").write_text(json.dumps({**report, "steps": log}, indent=1) + "\n")
    write_card(out, report, log)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vtoken.tiny.train", description=train.__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(BUILDERS))
    parser.add_argument("--out", default=None, help="folder to write (default: tiny-NAME)")
    parser.add_argument("--minutes", type=float, default=None, help="upper limit of the training time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="take stage one from an earlier, interrupted run")
    args = parser.parse_args()
    out = args.out or f"tiny-{args.name}"
    report = train(args.name, out, args.minutes, args.device, args.seed, args.resume)
    print(json.dumps({k: report[k] for k in ("accuracy", "localisation", "pruned", "training_minutes")}, indent=1))


if __name__ == "__main__":
    main()
