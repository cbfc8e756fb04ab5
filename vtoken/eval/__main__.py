"""`python -m vtoken.eval mme | videomme | tiny`."""

from __future__ import annotations

from pathlib import Path

import click

from ..cli import Budget, console, fail, quiet
from .commands import mme, separated, videomme


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Accuracy against kept visual tokens."""


cli.add_command(mme)
cli.add_command(videomme)


@cli.command()
@click.option(
    "--strategies",
    callback=separated,
    help="Names separated by commas, hired,visionzip+fastv for instance; default: all that fit.",
)
@click.option("--budgets", callback=separated, default="1.0,0.5,0.33,0.2,0.1", show_default=True)
@click.option("--questions", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which held-out scenes.")
@click.option("--batch-size", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--output", default="docs/tiny_llava", show_default=True, help="Stem of the .json, .md and .png files.")
@click.option("--resume", is_flag=True, help="Take over cells of an interrupted run from the .json file.")
def tiny(
    strategies: list[str], budgets: list[str], questions: int, seed: int, batch_size: int, output: str, resume: bool
) -> None:
    """The tiny LLaVA that ships with vtoken, on scenes it has never seen."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from .board import Board, parse_strategy

    shares = [Budget().convert(b, None, None) for b in budgets]
    if not shares:
        raise fail("Give at least one budget, such as --budgets 0.5,0.2.")
    try:
        for name in strategies:
            parse_strategy(name)
        quiet()
        from .. import tiny as shipped
        from .tiny_board import fitting_strategies, plan, tiny_board

        names = strategies or fitting_strategies(shipped.load("llava")[0])
        out, path = console(), Path(output).with_name(Path(output).name + ".json")
        known = Board.load(path) if resume and path.is_file() else None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=out) as bar:
            task = bar.add_task("questions", total=len(plan(names, shares)) * questions)

            def board_done(board: Board) -> None:
                cell = board.cells[-1]
                board.save_json(path)
                line = f"{cell.strategy} {cell.budget}: {cell.right} of {cell.asked} right with {cell.tokens:.1f} visual tokens"
                bar.console.print(line, highlight=False)

            def step(what: str, asked: int) -> None:
                bar.update(task, advance=asked, description=what)

            def refused(sentence: str) -> None:
                bar.console.print(f"left out, {sentence}", highlight=False, markup=False)

            board = tiny_board(names, shares, questions, seed, batch_size, step, board_done, known, refused)
        options = [f"--strategies {','.join(strategies)}"] * bool(strategies)
        options += [f"--budgets {','.join(budgets)} --questions {questions} --seed {seed}"]
        for written in board.save(output, f"python -m vtoken.eval tiny {' '.join(options)}"):
            out.print(f"wrote {written}", highlight=False)
    except (ValueError, OSError, ImportError) as error:
        raise fail(error) from None


if __name__ == "__main__":
    cli(prog_name="python -m vtoken.eval")
