"""Train the weights of a strategy with the Trainer of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..config import VTokenConfig, is_trained
from ..extras import require
from ..patching import patch, patch_of, unpatch
from ..saving import load_weights, save_strategy
from ..strategies.trained import trained_names, trained_part
from .collate import Collator
from .conversations import Conversation

LOG, CURVE = "training_log.json", "curve.png"


@dataclass
class Plan:
    """Length and rate of a training.

    Attributes:
        steps: optimiser steps.
        batch_size: conversations of one forward on one device.
        accumulate: forwards per optimiser step.
        rate: AdamW's learning rate after the warm-up, then falling as a cosine.
        warm_up: share of the steps with a rising rate.
        decay: weight decay.
        save_every: steps from one checkpoint to the next.
        seed: order of the conversations, and the first weights.
        bf16: whether matrices are multiplied in bfloat16.
        checkpointing: whether layers are computed again in the backward pass, to save memory.
        workers: processes that prepare batches.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    rate: float = 1e-3
    warm_up: float = 0.03
    decay: float = 0.0
    save_every: int = 500
    seed: int = 0
    bf16: bool = False
    checkpointing: bool = False
    workers: int = 0


def train_strategy(
    model: Any,
    processor: Any,
    strategy: VTokenConfig,
    data: Dataset[Conversation] | Sequence[Conversation],
    output: str | Path,
    plan: Plan,
    frames: int = 8,
    resume: bool = False,
    step: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train a strategy's weights on conversations, and save it in a folder.

    The folder then has `vtoken_config.json`, the weights, `training_log.json` and `curve.png`. Checkpoints
    are folders in it that hold the weights alone, not the model.

    Args:
        model: an unpatched model; at the end it has the patch.
        processor: the model's own.
        strategy: one that has weights.
        data: the conversations.
        output: the folder, made if needed.
        plan: length and rate.
        frames: of a video that are read.
        resume: go on from the last checkpoint in the folder, if there is one.
        step: called with every entry of the log.

    Returns:
        The log: step, loss and learning rate.

    Raises:
        ImportError: without accelerate.
        ValueError: for a strategy without weights, one that does not fit the model, a budget that reads all
            tokens, or a folder with checkpoints if `resume` is False.
    """
    require("accelerate", extra="eval")
    from transformers.trainer_utils import get_last_checkpoint

    folder = Path(output)
    if not is_trained(strategy.strategy):
        raise ValueError(
            f"{strategy.strategy} has no weights to train: choose one of {', '.join(trained_names())}."
        )
    torch.manual_seed(plan.seed)
    patch(model, strategy)
    try:
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        _check(model, strategy, folder, begun=last is not None and not resume)
        arguments = _arguments(plan, folder, quiet=step is not None)
        trainer = trainer_class()(
            model=model, args=arguments, train_dataset=data, data_collator=Collator(processor, frames)
        )
        if step is not None:
            trainer.add_callback(_told(step))
        trainer.train(resume_from_checkpoint=last)
    except BaseException:
        unpatch(model)
        raise
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    save_strategy(model, folder)
    (folder / LOG).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    draw_curve(log, folder / CURVE)
    return log


def _check(model: Any, strategy: VTokenConfig, folder: Path, begun: bool) -> None:
    """Raise ValueError if no weights would be trained, or those of an earlier training overwritten."""
    part = trained_part(patch_of(model).strategy)  # type: ignore[union-attr]
    if part is None or part.is_identity:
        raise ValueError(
            f"A budget of {strategy.budget} reads all visual tokens, without the weights of"
            f" {strategy.strategy}: train with a smaller one, such as 0.1."
        )
    if begun:
        raise ValueError(
            f"{str(folder)!r} has checkpoints of an earlier training: go on from them with resume (--resume),"
            " or name another folder."
        )


def _arguments(plan: Plan, folder: Path, quiet: bool) -> Any:
    """The plan as `transformers.TrainingArguments`; `quiet` leaves the progress bar out."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.accumulate,
        learning_rate=plan.rate,
        warmup_steps=max(1, round(plan.warm_up * plan.steps)),
        weight_decay=plan.decay,
        lr_scheduler_type="cosine",
        logging_steps=max(1, min(10, plan.steps // 10)),
        save_steps=plan.save_every,
        save_total_limit=2,
        seed=plan.seed,
        bf16=plan.bf16,
        **({"gradient_checkpointing": True} if plan.checkpointing else {}),
        dataloader_num_workers=plan.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=quiet,
    )


def trainer_class() -> type:
    """A `transformers.Trainer` whose checkpoints hold a strategy's weights and not the model's."""
    from transformers import Trainer

    class StrategyTrainer(Trainer):
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            save_strategy(self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            load_weights(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    return StrategyTrainer


def _told(step: Callable[[dict[str, float]], None]) -> Any:
    from transformers import TrainerCallback

    class Told(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            step({"step": state.global_step, **(logs or {})})

    return Told()


def draw_curve(log: Sequence[dict[str, float]], path: Path) -> None:
    """Draw the loss over the steps; without matplotlib nothing is drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([entry["step"] for entry in log], [entry["loss"] for entry in log])
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    figure.savefig(path, dpi=120)
