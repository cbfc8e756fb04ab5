"""The command `vtoken eval tiny`: accuracy boards of the tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..asking import quiet
from ..extras import require
from .options import Budget, Command, command_line, console, listed, progress

if TYPE_CHECKING:
    from rich.console import Console

    from ..eval.board.board import Board
    from ..eval.board.tiny import Subject


@click.command(cls=Command, short_help="The board of the tiny models that ship with vtoken.")
@listed("--model", "models", default=["llava"], show_default=True, help="Tiny models, separated by commas.")
@click.option("--all", "everything", is_flag=True, help="All tiny models that ship with vtoken.")
@listed(
    "--strategies",
    help="Names separated by commas, hired,visionzip+fastv for instance; default: all that fit.",
)
@listed(
    "--budgets",
    help="Separated by commas; default: 0.5,0.33,0.2,0.1,0.05, of harder questions 0.33,0.2,0.1,0.05,0.02.",
)
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
    models: list[str],
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
    from ..eval.board.page import write
    from ..eval.running.answer_log import locked
    from ..strategies.registry import parse_strategy

    shares = [Budget().convert(b, None, None) for b in budgets]
    page = page_of(output)
    folder = page.with_suffix("")
    require("matplotlib", extra="eval")
    for name in strategies:
        parse_strategy(name)
    quiet()
    from .. import tiny as shipped
    from ..eval.board.tiny import subjects

    names = shipped.names() if everything else list(dict.fromkeys(models))
    for name in names:
        shipped.path(name)
    out, boards, pictures = console(), [], []
    out.print(f"the page is going to be {page}, its data and plots {folder}/", highlight=False)
    with locked(folder):
        for name in names:
            for subject in subjects(name, questions, seed, batch_size):
                chosen = strategies or subject.fitting()
                asked = shares or list(subject.budgets)
                boards.append(measured(subject, folder, chosen, asked, seed, resume, out))
                pictures.append(f"{folder.name}/{subject.stem}.png")
    options = ["--all"] if everything else [f"--model {name}" for name in names]
    options += [f"--strategies {','.join(strategies)}"] * bool(strategies)
    options += [f"--budgets {','.join(budgets)}"] * bool(budgets)
    options += [f"--questions {questions} --seed {seed}"]
    write(page, boards, f"vtoken eval tiny {' '.join(options)}", pictures)
    out.print(f"wrote {page}", highlight=False)


def measured(
    subject: Subject,
    folder: Path,
    chosen: list[str],
    shares: list[float | int],
    seed: int,
    resume: bool,
    out: Console,
) -> Board:
    """The board of one subject, saved after every cell and drawn at the end."""
    from ..eval.board.board import Board, Cell
    from ..eval.board.plot import draw
    from ..eval.board.tiny import plan, tiny_board

    path = folder / f"{subject.stem}.json"
    known = Board.load(path) if resume and path.is_file() else None
    with progress(out) as bar:
        asked = sum(len(batch.asked) for batch in subject.batches)
        task = bar.add_task(subject.stem, total=len(plan(chosen, shares)) * asked)

        def cell_done(board: Board, cell: Cell) -> None:
            board.command = command_line()
            board.save(path)
            said = f"{cell.right} of {cell.asked} right with {cell.tokens:.1f} visual tokens"
            bar.console.print(
                f"{subject.stem} {cell.strategy} {cell.budget}: {said}, {cell.seconds:.1f} s", highlight=False
            )

        def step(what: str, n: int) -> None:
            bar.update(task, advance=n, description=f"{subject.stem} {what}")

        def refused(sentence: str) -> None:
            bar.console.print(f"left out, {sentence}", highlight=False, markup=False)

        board = tiny_board(subject, chosen, shares, seed, step, cell_done, known, refused)
    draw(board, folder / f"{subject.stem}.png")
    return board


def page_of(output: str) -> Path:
    """The page that --output names: the file itself, or board.md in a folder."""
    path = Path(output)
    return path if path.suffix and not path.is_dir() else path / "board.md"
