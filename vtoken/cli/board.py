"""The command `vtoken eval tiny`: accuracy boards of the tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..asking import quiet
from ..extras import require
from .options import Budget, Command, console, fail, separated

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@click.command(cls=Command)
@click.option(
    "--model",
    "models",
    multiple=True,
    default=["llava"],
    show_default=True,
    help="A tiny model; may be repeated.",
)
@click.option("--all", "everything", is_flag=True, help="All tiny models that ship with vtoken.")
@click.option(
    "--strategies",
    callback=separated,
    help="Names separated by commas, hired,visionzip+fastv for instance; default: all that fit.",
)
@click.option("--budgets", callback=separated, default="0.5,0.33,0.2,0.1,0.05", show_default=True)
@click.option(
    "--questions",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Per model, images and clips together.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which held-out examples."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=50, show_default=True)
@click.option(
    "--output",
    default="vtoken-tiny",
    show_default=True,
    help="Folder that gets board.md, or the page itself (NAME.md), whose tables are replaced if it is there.",
)
@click.option("--resume", is_flag=True, help="Take over cells of an interrupted run.")
def tiny(
    models: tuple[str, ...],
    everything: bool,
    strategies: list[str],
    budgets: list[str],
    questions: int,
    seed: int,
    batch_size: int,
    output: str,
    resume: bool,
) -> None:
    """The tiny models that ship with vtoken, on scenes and clips they have never seen."""
    from ..eval.board.board import Board, Cell
    from ..eval.board.page import write
    from ..eval.board.plot import draw
    from ..eval.running.answer_log import locked
    from ..strategies.registry import parse_strategy

    shares = [Budget().convert(b, None, None) for b in budgets]
    if not shares:
        raise fail("Give at least one budget, such as --budgets 0.5,0.2.")
    page = page_of(output)
    folder = page.with_suffix("")
    require("matplotlib", extra="eval")
    for name in strategies:
        parse_strategy(name)
    quiet()
    from .. import tiny as shipped
    from ..eval.board.tiny import Subject, plan, subjects, tiny_board

    names = shipped.names() if everything else list(dict.fromkeys(models))
    for name in names:
        shipped.path(name)
    out, boards, pictures = console(), [], []

    def one(subject: Subject) -> Board:
        path = folder / f"{subject.stem}.json"
        known = Board.load(path) if resume and path.is_file() else None
        chosen = strategies or subject.fitting()
        with progress(out) as bar:
            asked = sum(len(batch.asked) for batch in subject.batches)
            task = bar.add_task(subject.stem, total=len(plan(chosen, shares)) * asked)

            def cell_done(board: Board, cell: Cell) -> None:
                board.save(path)
                said = (
                    f"{cell.right} of {cell.asked} right with {cell.tokens:.1f} visual tokens,"
                    f" {cell.seconds:.1f} s"
                )
                bar.console.print(f"{subject.stem} {cell.strategy} {cell.budget}: {said}", highlight=False)

            def step(what: str, n: int) -> None:
                bar.update(task, advance=n, description=f"{subject.stem} {what}")

            def refused(sentence: str) -> None:
                bar.console.print(f"left out, {sentence}", highlight=False, markup=False)

            board = tiny_board(subject, chosen, shares, seed, step, cell_done, known, refused)
        draw(board, folder / f"{subject.stem}.png")
        return board

    out.print(f"the page is going to be {page}, its data and plots {folder}/", highlight=False)
    with locked(folder):
        for name in names:
            for subject in subjects(name, questions, seed, batch_size):
                boards.append(one(subject))
                pictures.append(f"{folder.name}/{subject.stem}.png")
    options = ["--all"] if everything else [f"--model {name}" for name in names]
    options += [f"--strategies {','.join(strategies)}"] * bool(strategies)
    options += [f"--budgets {','.join(budgets)} --questions {questions} --seed {seed}"]
    write(page, boards, f"vtoken eval tiny {' '.join(options)}", pictures)
    out.print(f"wrote {page}", highlight=False)


def page_of(output: str) -> Path:
    """The page that --output names: the file itself, or board.md in a folder."""
    path = Path(output)
    return path if path.suffix and not path.is_dir() else path / "board.md"


def progress(out: Console) -> Progress:
    """A progress bar on a rich console."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("{task.description}")
    return Progress(
        text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=out
    )
