"""Training loop of all stages of all recipes: schedule, optimisers, log and checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from .optimiser import optimisers


class Steps(Dataset):
    """One item per training step, ``make(step)``, from step ``first`` on."""

    def __init__(self, steps: int, make: Callable[[int], Any], first: int = 0) -> None:
        self.steps, self.make, self.first = steps, make, first

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> Any:
        return self.make(self.first + index)


def optimise(
    stage: str,
    parameters: dict[str, torch.nn.Parameter],
    make: Callable[[int], Any],
    loss_of: Callable[[Any, float], tuple[torch.Tensor, dict[str, float]]],
    plan: dict[str, Any],
    log: list[dict],
    facts: Callable[[], dict[str, float]] = dict,
    steps: int | None = None,
    seconds: float | None = None,
    workers: int = 0,
    keep: Path | None = None,
) -> None:
    """Train with Muon and AdamW: 50 warm-up steps, then constant, then linearly down over the last third.

    Args:
        stage: its name in ``log`` and in ``keep``.
        parameters: the trained ones, by name.
        make: the batch of a step, a function of the step alone.
        loss_of: ``(batch, share of training done) -> (loss, facts about the batch)``.
        plan: ``steps``, ``rate`` (AdamW), ``muon_rate``; the rest is the recipe's own.
        log: gets an entry every 20th step.
        facts: held-out measures, for every 100th step and the last one.
        steps: number of steps instead of the plan's.
        seconds: training ends after the number of steps, or after this time if that comes first.
        workers: processes that make batches ahead.
        keep: folder for ``<stage>.safetensors``, written every 50 steps; a stage that is found there goes on
            from its last state, and a finished one is not run again.
    """
    steps = steps or plan["steps"]
    used = optimisers(parameters.items(), plan["rate"], plan["muon_rate"])
    rates = [group["lr"] for optimiser in used for group in optimiser.param_groups]
    first, spent = _resume(keep, stage, parameters, used, log)
    groups = [*zip((group for optimiser in used for group in optimiser.param_groups), rates)]
    began = time.perf_counter() - spent
    batches = Steps(steps, make, first)
    for step, item in enumerate(DataLoader(batches, batch_size=None, num_workers=workers), first):
        done = step / steps
        if seconds:
            done = max(done, (time.perf_counter() - began) / seconds)
        if done >= 1:
            if keep:
                _save(keep, stage, parameters, used, log, step, time.perf_counter() - began)
            break
        for group, rate in groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.01 + 0.99 * min(1, 3 * (1 - done)))
        loss, extra = loss_of(item, done)
        for p in parameters.values():
            p.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimiser in used:
            optimiser.step()
        if step % 20 == 0 or step == steps - 1:
            entry = {
                "stage": stage,
                "step": step,
                "seconds": time.perf_counter() - began,
                "loss": loss.item(),
                **extra,
            }
            if step % 100 == 0 or step == steps - 1:
                entry |= facts()
                print(
                    *(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()),
                    flush=True,
                )
            log.append({k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()})
        if keep and (step % 50 == 49 or step == steps - 1):
            _save(keep, stage, parameters, used, log, step + 1, time.perf_counter() - began)


def _save(
    keep: Path, stage: str, parameters: dict, used: list, log: list[dict], following: int, spent: float
) -> None:
    """Write ``<stage>.safetensors`` so that an interruption leaves the old file or the new one.

    Numbers that are no tensor lie in the file's metadata as JSON: reading the file runs no code.
    """
    tensors = {f"parameters/{name}": p for name, p in parameters.items()}
    for i, optimiser in enumerate(used):
        for number, values in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{i}/{number}/{key}": value for key, value in values.items()}
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    facts = json.dumps({"next": following, "seconds": spent, "log": log})
    save_file(plain, keep / f"{stage}.part", metadata={"facts": facts})
    (keep / f"{stage}.part").replace(keep / f"{stage}.safetensors")


def _resume(
    keep: Path | None, stage: str, parameters: dict[str, torch.nn.Parameter], used: list, log: list[dict]
) -> tuple[int, float]:
    """The next step and the seconds spent so far; restores weights, optimisers and log."""
    path = keep and keep / f"{stage}.safetensors"
    if not path or not path.exists():
        return 0, 0.0
    states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in used]
    with safe_open(path, "pt") as file, torch.no_grad():
        facts = json.loads(file.metadata()["facts"])
        for name in file.keys():  # noqa: SIM118 (a file is no mapping)
            kind, _, rest = name.partition("/")
            if kind == "parameters":
                parameters[rest].copy_(file.get_tensor(name))
            else:
                i, number, key = rest.split("/")
                states[int(i)].setdefault(int(number), {})[key] = file.get_tensor(name)
    for optimiser, state in zip(used, states):
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    log[:] = facts["log"]
    return facts["next"], facts["seconds"]
