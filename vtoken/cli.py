"""`vtoken demo | list | info | eval | bench`, for people at a terminal."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


class Budget(click.ParamType):
    """A share with a decimal point, a number of tokens without one."""

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | int:
        from .strategies.base import check_budget

        try:
            return check_budget(
                value if isinstance(value, (int, float)) else float(value) if "." in value else int(value)
            )
        except ValueError as error:
            words = str(error) if "budget" in str(error) else f"{value!r} is no number: use 0.2 or 128, for instance."
            return self.fail(words, param, ctx)


def fail(sentence: object) -> click.UsageError:
    """Bad input: one sentence and exit code 2."""
    return click.UsageError(" ".join(str(sentence).split()))


def console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110)


def quiet() -> None:
    """Keep transformers' own progress bars and notices out of the picture."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vtoken")
def cli() -> None:
    """Vision-language models that read fewer visual tokens."""


@cli.command("list")
@click.argument("pattern", default="*")
@click.option("--names", is_flag=True, help="Only the names, one a line.")
def list_command(pattern: str, names: bool) -> None:
    """The strategies whose names match a shell PATTERN such as "*cls*"."""
    from .strategies import list_names, strategy_info

    found = list_names(pattern)
    if not found:
        raise fail(f"No strategy matches {pattern!r}: there are {', '.join(list_names())}.")
    if names:
        click.echo("\n".join(found))
        return
    from rich.table import Table

    table = Table("strategy", "stages", "what it does", "paper", box=None, pad_edge=False)
    for info in map(strategy_info, found):
        kind = "baseline" if info.baseline else info.paper.rpartition(", ")[2]
        table.add_row(f"[bold]{info.name}[/bold]", ", ".join(info.stages), info.summary, kind)
    console().print(table)


@cli.command()
@click.argument("name")
def info(name: str) -> None:
    """What is known of one strategy: paper, code, hyper-parameters with defaults."""
    from dataclasses import MISSING

    from rich.markup import escape
    from rich.table import Table

    from .strategies import strategy_info

    try:
        known = strategy_info(name)
    except ValueError as error:
        raise fail(error) from None
    out = console()
    out.print(f"[bold]{known.name}[/bold]  {escape(known.summary)}")
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "stages": ", ".join(known.stages),
        "paper": known.paper or "none: a baseline",
        "code": f"{known.code} ({known.code_licence or 'no licence stated'})" if known.code else "",
        "differs": known.differs,
        "status": "experimental" if known.experimental else "",
    }
    for key, value in rows.items():
        if value:
            table.add_row(f"[dim]{key}[/dim]", escape(value))
    for key, default in known.defaults.items():
        table.add_row(f"[dim]{key}[/dim]", "required" if default is MISSING else escape(repr(default)))
    out.print(table)
    out.print(f'vtoken.patch(model, "{known.name}", budget=0.2)', style="cyan", highlight=False)


@cli.group(invoke_without_command=True)
@click.option("--image", type=click.Path(), help="Ask about this image instead of a generated scene.")
@click.option("--question", help="The question; needed with --image unless the tiny model answers.")
@click.option("--strategy", default="hired", show_default=True, help="See `vtoken list`; two are joined by +.")
@click.option("--budget", type=Budget(), default="0.2", show_default=True, help="A share such as 0.2, or a count: 64.")
@click.option("--model", "model_id", help="Hub id or folder of a vision-language model; default: the shipped tiny one.")
@click.option("--output", type=click.Path(dir_okay=False), default="vtoken_demo.png", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which held-out scene.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.pass_context
def demo(context: click.Context, **options: Any) -> None:
    """Ask a model with all visual tokens and with fewer, and draw the ones that were kept."""
    if context.invoked_subcommand is not None:
        return
    from .demo import run

    options["max_new_tokens"] = int(options["max_new_tokens"])
    try:
        run(console(), **options)
    except (ValueError, OSError, ImportError) as error:
        raise fail(error) from None


PASSED_ON = {"context_settings": {"ignore_unknown_options": True, "help_option_names": []}, "add_help_option": False}


@demo.command("stream", **PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def stream(arguments: tuple[str, ...]) -> None:
    """Questions to a live stream, in a browser or at a terminal; try `vtoken demo stream --help`."""
    from .streaming.command import stream_command

    stream_command.main(args=list(arguments), prog_name="vtoken demo stream", standalone_mode=False)


@cli.command("eval", **PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def eval_command(arguments: tuple[str, ...]) -> None:
    """Accuracy against kept tokens, as `python -m vtoken.eval`; try `vtoken eval --help`."""
    from .eval.__main__ import cli as evaluation

    evaluation.main(args=list(arguments), prog_name="vtoken eval", standalone_mode=False)


@cli.command()
@click.option(
    "--shape", "shapes", multiple=True, help="A published shape with random weights, or all; may be repeated."
)
@click.option("--model", "model_id", help="Hub id or folder of a vision-language model; default: the shipped tiny one.")
@click.option(
    "--scale", type=click.Choice(["full", "cpu", "tiny"]), help="Of shapes; default: full on a GPU, else cpu."
)
@click.option("--device", help="Where shapes are built; default: a GPU if there is one.")
@click.option("--strategy", "strategies", multiple=True, help="May be repeated; default: all that fit the model.")
@click.option(
    "--budget", "budgets", type=Budget(), multiple=True, default=["0.1", "0.2", "0.33", "0.5", "1.0"], show_default=True
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Timed pairs per cell.")
@click.option("--decode", "steps", type=click.IntRange(min=0), default=64, show_default=True, help="Decode steps.")
@click.option("--limit", type=click.FloatRange(min=0), help="Seconds per shape after which no further turn begins.")
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    default="wall",
    show_default=True,
    help="cpu: processor time, for a CPU that others use too; with OMP_NUM_THREADS=1.",
)
@click.option("--output", type=click.Path(dir_okay=False), help="JSON report; one that exists gains these shapes.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Picture of measured against promised speed-ups.")
@click.option(
    "--compare", nargs=2, type=click.Path(), help="Two reports: print how their times relate, measure nothing."
)
def bench(compare: tuple[str, str] | None, **options: Any) -> None:
    """Time every stage with and without a strategy, in turns, next to what the FLOPs promise."""
    from .bench import run

    try:
        if compare:
            run.compare(console(), *compare)
        else:
            run.run(console(), **options)
    except (ValueError, OSError, ImportError) as error:
        raise fail(error) from None


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `vtoken` command."""
    cli.main(args=arguments, prog_name="vtoken")


if __name__ == "__main__":
    main()
