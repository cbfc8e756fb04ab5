"""The options of the benchmarks of plain encoders, and the runs that they ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .options import Budget, listed

if TYPE_CHECKING:
    from ..eval.running.encoder_runs import EncoderRun


def common(strategy: str, batch_size: int, output: str) -> Callable[[Callable[..., None]], Any]:
    """The options that both benchmarks have."""
    options = [
        click.option("--checkpoint", type=click.Path(dir_okay=False), help="Weights, a safetensors file."),
        click.option("--pretrained", is_flag=True, help="Let timm download its weights; for timm:NAME only."),
        click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32",
                     show_default=True),
        listed("--strategy", "strategies", default=[strategy], show_default=True,
               help="Names separated by commas."),
        listed("--r", "removed",
               help="Tokens removed per layer; several are several runs: 8,13,16."),
        click.option("--budget", type=Budget(),
                     help="Share (or number) of patch tokens left after the last layer: 0.6."),
        listed("--budgets", help="Several budgets, separated by commas: 0.8,0.6."),
        listed("--flops",
               help="Shares of the unpatched model's FLOPs: 0.8,0.6."),
        click.option("--prop-attn/--no-prop-attn", default=None,
                     help="Whether attention counts merged tokens by their size."),
        click.option("--option", "others", multiple=True, metavar="KEY=VALUE",
                     help="A hyper-parameter of all strategies; may be repeated."),
        click.option("--batch-size", type=click.IntRange(min=1), default=batch_size, show_default=True),
        click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True,
                     help="Processes that open and preprocess; on a GPU 8, for instance."),
        click.option("--limit", type=click.IntRange(min=1),
                     help="Use this many samples, in equal steps over the data."),
        click.option("--output", type=click.Path(file_okay=False), default=output, show_default=True,
                     help="Folder of the values; a run that is there is continued."),
        click.option("--example", is_flag=True, help="Use small generated data."),
    ]  # fmt: skip

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def plan_of(
    strategies: list[str],
    removed: list[str],
    budget: float | int | None,
    budgets: list[str],
    flops: list[str],
    prop_attn: bool | None,
    others: tuple[str, ...],
) -> list[EncoderRun]:
    """The runs that the options ask for. Raises ValueError for an option that is no such thing."""
    from ..eval.running.encoder_runs import plan
    from ..strategies.registry import parse_strategy

    if budget is not None and budgets:
        raise ValueError("--budget and --budgets exclude each other.")
    for name in strategies:
        parse_strategy(name)
    some = [Budget().convert(b, None, None) for b in budgets]
    some += [budget] if budget is not None else []
    amounts = {"r": [number("--r", r, int) for r in removed], "budget": some,
               "flops": [number("--flops", f, float) for f in flops]}  # fmt: skip
    options = dict(map(pair, others)) | ({} if prop_attn is None else {"prop_attn": prop_attn})
    if taken := [key for key in ("r", "budget", "flops", "frames") if key in options]:
        raise ValueError(f"--option {taken[0]}=... has an option of its own: give --{taken[0]}.")
    runs = plan(strategies, amounts, **options)
    if idle := next(filter(changes_nothing, runs), None):
        raise ValueError(
            f"{idle.name} changes nothing: leave it out, the unpatched model is measured beside every run."
        )
    return runs


def changes_nothing(run: EncoderRun) -> bool:
    """Whether a run is that of the unpatched model under another name; False for options that are refused."""
    from ..strategies.registry import create, parse_strategy

    name = None if run.strategy is None else parse_strategy(run.strategy)
    if not isinstance(name, str):
        return False
    try:
        return bool(create(name, **run.options).is_identity)
    except (TypeError, ValueError):
        return False


def number(option: str, text: str, kind: type) -> Any:
    """A whole number from 0, or a share above 0 and up to 1. Raises ValueError."""
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not (value >= 0 if kind is int else 0 < value <= 1):
        wanted = (
            "whole numbers such as 8,13" if kind is int else "shares above 0 and up to 1, such as 0.8,0.6"
        )
        raise ValueError(f"{option} takes {wanted}, found {text!r}.")
    return value


def pair(text: str) -> tuple[str, Any]:
    """Key and value of KEY=VALUE; the value is JSON if it can be read as such, else text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip().isidentifier():
        raise ValueError(f"--option takes KEY=VALUE, such as prop_attn=false, found {text!r}.")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value
