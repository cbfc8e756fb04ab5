"""`vtoken train`: train the weights of a strategy on a folder of conversations."""

from __future__ import annotations

from typing import Any

import click

from .._json import value_of
from .options import MODEL, Budget, Command, console, fail


@click.command("train", cls=Command, short_help="Train a strategy that has weights.")
@click.argument("strategy")
@click.option("--model", "model_id", required=True, help=MODEL)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False),
    required=True,
    help="Folder with data.json or data.jsonl in LLaVA's format, and the pictures that it names.",
)
@click.option("--output", type=click.Path(file_okay=False), required=True, help="Folder for the weights.")
@click.option("--budget", type=Budget(), help="A share such as 0.1, or a count: 16.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="Of the strategy; repeatable.")
@click.option("--steps", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Batches per step."
)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True)
@click.option("--frames", type=click.IntRange(min=1), default=8, show_default=True, help="Of a video.")
@click.option("--save-every", type=click.IntRange(min=1), default=500, show_default=True, help="Steps.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--bf16", is_flag=True, help="Multiply in bfloat16.")
@click.option("--checkpointing", is_flag=True, help="Compute layers again in the backward pass.")
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output.")
def train(
    strategy: str,
    model_id: str,
    data: str,
    output: str,
    budget: float | int | None,
    options: tuple[str, ...],
    frames: int,
    resume: bool,
    **plan: Any,
) -> None:
    """Train the weights of STRATEGY, such as pvc, on conversations about images and videos.

    The model's own weights stay as they are.
    """
    from ..fine_tuning.conversations import Conversations

    if odd := [option for option in options if "=" not in option]:
        raise fail(f"Options are written as side=2, found {odd[0]}.")
    given = {k: value_of(v) for k, v in (option.split("=", 1) for option in options)}
    conversations = Conversations(data)  # before the model is loaded
    from ..asking import load, quiet
    from ..config import VTokenConfig
    from ..fine_tuning.train import Plan, train_strategy

    quiet()
    model, processor = load(model_id)
    config, out = VTokenConfig(strategy, budget, options=given), console()
    log = train_strategy(
        model, processor, config, conversations, output, Plan(**plan), frames=frames, resume=resume
    )
    out.print(f"loss {log[0]['loss']:.3f} -> {log[-1]['loss']:.3f}; saved in {output}", highlight=False)
    out.print(
        f'vtoken.patch(model, vtoken.VTokenConfig.from_pretrained("{output}"))', style="cyan", highlight=False
    )
