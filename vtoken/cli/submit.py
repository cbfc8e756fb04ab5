"""The command `vtoken board submit`: a result for the table of submissions."""

from __future__ import annotations

import click

from .options import Command, Group, console

FOLDER = "docs/board/submissions"


@click.group(cls=Group, short_help="Results for the table of submissions.")
def board() -> None:
    """Measured results, for the table of submissions in docs/board.md."""


@board.command(cls=Command, short_help="Check a result and add it to the submissions.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--to", "folder", default=FOLDER, show_default=True, help="Folder that gets NAME.json.")
@click.option("--name", help="Of the file, without its ending; default: made of the title.")
def submit(file: str, folder: str, name: str | None) -> None:
    """Check FILE, results.json of `vtoken eval mme` or `videomme`, or a board of `vtoken eval tiny`.

    What is written has no answers and no names of items: title, command, settings, and of every strategy and
    budget the visual tokens that were read, FLOPs, and right answers.
    """
    from ..eval.board.submission import Submission

    submission = Submission.load(file)
    path = submission.save(folder, name)
    count = len(submission.cells)
    cells = f"{count} {'cell' if count == 1 else 'cells'} of {submission.questions} questions"
    out = console()
    out.print(f"wrote {path}: {submission.title}, {cells}", highlight=False, markup=False)
    out.print("In a clone, `make docs` adds it to docs/board.md; send both in a pull request.", markup=False)
