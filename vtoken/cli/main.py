"""The `vtoken` command: list, info, demo and bench here, larger commands imported on demand."""

from __future__ import annotations

from typing import Any

import click

from .options import MODEL, Budget, Group, console, fail, listed


@click.group(
    cls=Group,
    lazy={
        "ask": "vtoken.cli.ask:ask",
        "board": "vtoken.cli.submit:board",
        "compare": "vtoken.cli.compare:compare",
        "eval": "vtoken.cli.evaluate:evaluate",
        "train": "vtoken.cli.train:train",
    },
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="vtoken")
def cli() -> None:
    """Vision-language models that read fewer visual tokens."""


@cli.command("list", short_help="The strategies.")
@click.argument("pattern", default="*")
@click.option("--names", is_flag=True, help="Only the names, one a line.")
def list_command(pattern: str, names: bool) -> None:
    """The strategies whose names match a shell PATTERN such as "*cls*"."""
    from ..strategies import list_names, strategy_info

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


@cli.command(short_help="Facts about a strategy.")
@click.argument("name")
def info(name: str) -> None:
    """Facts about a strategy: paper, code, hyper-parameters with defaults; two are joined by +."""
    from ..strategies import combine, strategy_info
    from ..strategies.registry import parse_strategy

    names = parse_strategy(name)
    if isinstance(names, list):
        combine(names)  # raises if they do not fit together
    parts = [names] if isinstance(names, str) else names
    for part in parts:
        show_info(part)
    budget = ", budget=0.2" if any(strategy_info(p).cls.takes_budget() for p in parts) else ""
    given = f'"{names}"' if isinstance(names, str) else str(names).replace("'", '"')
    console().print(f"vtoken.patch(model, {given}{budget})", style="cyan", highlight=False, markup=False)


def show_info(name: str) -> None:
    """Print the registered facts of one strategy."""
    from dataclasses import MISSING

    from rich.markup import escape
    from rich.table import Table

    from ..strategies import strategy_info

    known = strategy_info(name)
    out = console()
    out.print(f"[bold]{known.name}[/bold]  {escape(known.summary)}")
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "stages": ", ".join(known.stages),
        "paper": known.paper or ("none: a baseline" if known.baseline else "none"),
        "code": f"{known.code} ({known.code_licence or 'no licence stated'})" if known.code else "",
        "differs": known.differs,
        "budget counts": known.budget_counts,
        "status": "experimental" if known.experimental else "",
    }
    for key, value in rows.items():
        if value:
            table.add_row(f"[dim]{key}[/dim]", escape(value))
    for key, default in known.defaults.items():
        table.add_row(f"[dim]{key}[/dim]", "required" if default is MISSING else escape(repr(default)))
    out.print(table)


@cli.group(
    invoke_without_command=True,
    short_help="Ask a model with all visual tokens and with fewer.",
    lazy={"explore": "vtoken.cli.explore:explore_command", "stream": "vtoken.cli.stream:stream_command"},
)
@click.option("--image", type=click.Path(), help="Ask about this image instead of a generated scene.")
@click.option("--question", help="The question; needed with --image unless the tiny model answers.")
@click.option(
    "--strategy",
    default="hired",
    show_default=True,
    help="See `vtoken list`; two are joined by +, options stand in parentheses: 'fastv(layer=3)'.",
)
@click.option("--budget", type=Budget(), help="A share such as 0.2, or a count: 64.  [default: 0.2]")
@click.option("--model", "model_id", help=MODEL)
@click.option("--output", type=click.Path(dir_okay=False), default="vtoken_demo.png", show_default=True)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which held-out scene."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.pass_context
def demo(context: click.Context, **options: Any) -> None:
    """Ask a model with all visual tokens and with fewer, and draw the ones that were kept."""
    if context.invoked_subcommand is not None:
        return
    from .demo import run

    # not click's default, which `vtoken demo stream --help` would convert too, by code that needs torch
    options["budget"] = 0.2 if options["budget"] is None else options["budget"]
    run(console(), **options)


@cli.command(short_help="Time every stage with and without a strategy.")
@listed(
    "--shape",
    "shapes",
    help="Published shapes with random weights, separated by commas, or all. [default: llava-1.5-7b]",
)
@click.option("--model", "model_id", help=MODEL)
@click.option(
    "--scale",
    type=click.Choice(["full", "cpu", "quick", "tiny"]),
    help="Of shapes: full is the published size. [default: full on a GPU, else cpu; quick without --shape]",
)
@click.option("--device", help="Where shapes are built; default: a GPU if there is one.")
@listed(
    "--strategy",
    "strategies",
    help="Names separated by commas; two are joined by +, options stand in parentheses: 'fastv(layer=3)'."
    " [default: all that fit; 3 without --shape]",
)
@click.option(
    "--budget",
    "budgets",
    type=Budget(),
    multiple=True,
    help="May be repeated. [default: 0.1, 0.2, 0.33, 0.5 and 1.0; 0.2 and 0.5 without --shape]",
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Timed pairs per cell."
)
@click.option(
    "--decode", "steps", type=click.IntRange(min=0), help="Decode steps. [default: 64; 16 without --shape]"
)
@click.option(
    "--limit",
    type=click.FloatRange(min=0),
    help="Seconds per shape after which no further turn begins. [default: none; 40 without --shape]",
)
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    help=(
        "cpu: processor time, for a CPU that others use too; with OMP_NUM_THREADS=1. [default: wall; cpu"
        " without --shape]"
    ),
)
@click.option(
    "--output", type=click.Path(dir_okay=False), help="JSON report; one that exists gains these shapes."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False), help="Picture of measured against promised speed-ups."
)
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(),
    help="Two reports: print how their times relate, measure nothing.",
)
def bench(compare: tuple[str, str] | None, **options: Any) -> None:
    """Time every stage with and without a strategy, in turns, and compare with what the FLOPs promise."""
    from ..bench import run

    if compare:
        run.compare(console(), *compare)
    else:
        run.run(console(), **options)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `vtoken` command."""
    cli.main(args=arguments, prog_name="vtoken")
