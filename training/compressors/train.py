"""Trains a strategy's weights for a tiny model: ``python -m training.compressors.train pvc llava_onevision``.

The model stays as it is. Every step draws a budget, so that one set of weights serves them all.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vtoken
from training.tiny.card import draw
from training.tiny.loop import optimise
from training.tiny.train import cores, stages, versions
from vtoken import tiny
from vtoken.patching import patch_of
from vtoken.strategies.trained import TrainedStrategy
from vtoken.tiny.questions import answers, held_out, score

from .batches import Batch, assembled, examples, loss_of
from .card import card

BUDGETS = {0.25: 0.2, 0.125: 0.3, 0.0625: 0.5}  # and the share of the steps
PLAN: dict[str, Any] = {"steps": 2400, "batch": 8, "questions": 16, "rate": 2e-3, "muon_rate": 0.02}
# Of a stage in which every question has its own prompt: it sees few questions, and Muon, whose steps are of
# one size however weak the signal is, spoils there what new layers read.
ASKED: dict[str, Any] = {"steps": 1200, "questions": 4, "rate": 3e-4, "muon_rate": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "pvc": {"side": 2, "te_dim": 64, "image_repeats": 1},
    "quecc": {"side": 4, "heads": 4},
    "llava_mini": {"prefusion_layers": 2, "heads": 4},
    "voco": {"rank": 128},
}
# The first stage of strategies that read the question goes without it: many questions fit in a sequence then.
BLIND: dict[str, dict[str, Any]] = {"quecc": {"conditioned": False}, "llava_mini": {"prefusion_layers": 0}}
BLIND_SHARE = 0.6  # of the time
MODELS = {"llava_onevision": 1 / 3, "qwen2_5_vl": 1 / 2}  # and the share of the steps that have images
FIRST = 90_000_000  # scenes that the models have not seen


def make(processor: Any, name: str, plan: dict[str, Any], step: int) -> tuple[Batch, float]:
    """The questions of a step about images or clips, and its budget."""
    batch = assembled(processor, *examples(name, FIRST, plan["batch"], plan["questions"], step, MODELS[name]))
    drawn = np.random.Generator(np.random.PCG64([FIRST, step])).choice([*BUDGETS], p=[*BUDGETS.values()])
    return batch, float(drawn)


def run_stage(
    stage: str,
    model: Any,
    processor: Any,
    name: str,
    strategy: str,
    options: dict[str, Any],
    log: list[dict[str, Any]],
    seconds: float | None,
    keep: Path,
    known: dict[str, torch.Tensor] | None = None,
) -> TrainedStrategy:
    """Patch the model and train; returns the strategy. `known` are weights of an earlier stage."""
    vtoken.patch(model, strategy, budget=min(BUDGETS), **options)
    patch = patch_of(model)
    assert patch is not None and patch.trained is not None
    part, asks = patch.trained, patch.design.wants_text
    part.module.load_state_dict(known or {}, strict=False)
    plan = PLAN | (ASKED if asks else {})

    def measured(item: tuple[Batch, float], done: float) -> tuple[torch.Tensor, dict[str, float]]:
        batch, part.budget = item
        loss, right = loss_of(model, batch, bool(patch.design.temporal), asks)
        return loss, {"answers": right.item(), "budget": part.budget}

    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    draw_step = partial(make, processor, name, plan)
    optimise(stage, parameters, draw_step, measured, plan, log, seconds=seconds, keep=keep)
    return part


def train(
    strategy: str,
    name: str = "llava_onevision",
    out: str | Path = "compressor",
    minutes: float | None = None,
    seed: int = 0,
    resume: bool = False,
    questions: int = 500,
) -> dict[str, Any]:
    """Train, measure and save the weights of a strategy for a tiny model.

    Args:
        strategy: a key of OPTIONS.
        name: the tiny model.
        out: folder for the config, the weights, the log, the curve; ``out/stages`` keeps the state.
        minutes: upper limit of the training time; the schedule shrinks to fit.
        seed: of the first weights.
        resume: go on from the state of an interrupted run.
        questions: held-out ones of the final measurement.

    Returns:
        The report that is also written to ``training_log.json`` (without the step log).
    """
    folder = Path(out)
    keep = stages(folder, resume)
    torch.manual_seed(seed)
    model, processor = tiny.load(name)
    log, seconds, options = list[dict[str, Any]](), minutes and minutes * 60, OPTIONS[strategy]
    if strategy in BLIND:
        limit = seconds and seconds * BLIND_SHARE
        run_stage(
            f"{strategy} blind", model, processor, name, strategy, options | BLIND[strategy], log, limit, keep
        )
        known = model.vtoken_strategy.state_dict()
        vtoken.unpatch(model)
        seconds = seconds and seconds * (1 - BLIND_SHARE)
    else:
        known = {}
    part = run_stage(strategy, model, processor, name, strategy, options, log, seconds, keep, known)
    part.module.to(torch.bfloat16)  # half the size; what is measured is what ships
    vtoken.save_strategy(model, folder)
    part.module.to(model.dtype)
    pairs, accuracy = held_out(name, questions), {}
    for budget in BUDGETS:
        part.budget = budget
        accuracy[str(budget)] = score(pairs, answers(model, processor, pairs))
    spent = {entry["stage"]: entry["seconds"] for entry in log}
    report = {
        "strategy": strategy,
        "model": name,
        "options": options,
        "seed": seed,
        "parameters": sum(p.numel() for p in part.module.parameters()),
        "training_minutes": round(sum(spent.values()) / 60, 1),
        "machine": cores(),
        "versions": versions(),
        "questions": questions,
        "accuracy": accuracy,
        "recipe": PLAN | {"asked": ASKED, "budgets": [*BUDGETS.items()]},
    }
    write(folder, report, log)
    return report


def write(folder: Path, report: dict[str, Any], log: list[dict[str, Any]]) -> None:
    """Write `training_log.json`, `curve.png` and `README.md` into the folder of the weights."""
    (folder / "training_log.json").write_text(json.dumps({**report, "steps": log}, indent=1) + "\n")
    draw(folder / "curve.png", log)
    (folder / "README.md").write_text(card(report, log))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.compressors.train", description=train.__doc__.splitlines()[0]
    )
    parser.add_argument("strategy", choices=OPTIONS)
    parser.add_argument("name", choices=MODELS, help="tiny model")
    parser.add_argument("--out", default=None, help="folder to write (default: NAME-STRATEGY)")
    parser.add_argument("--minutes", type=float, default=None, help="upper limit of the training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from what an interrupted run left")
    a = parser.parse_args()
    report = train(a.strategy, a.name, a.out or f"{a.name}-{a.strategy}", a.minutes, a.seed, a.resume)
    print(json.dumps({k: report[k] for k in ("accuracy", "training_minutes")}, indent=1))


if __name__ == "__main__":
    main()
