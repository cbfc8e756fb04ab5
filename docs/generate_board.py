"""Fill the table of submissions in docs/board.md from docs/board/submissions.

python docs/generate_board.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from vtoken.eval.board.page import between
from vtoken.eval.board.submission import BEGIN, END, Submission, table

DOCS = Path(__file__).parent
PAGE, FOLDER = DOCS / "board.md", DOCS / "board" / "submissions"


def filled() -> str:
    """The page with a fresh table; ValueError for a file that `vtoken board submit` would refuse."""
    submissions = [Submission.load(path) for path in sorted(FOLDER.glob("*.json"))]
    made = "\n".join(table(submissions)) if submissions else "None yet.\n"
    return between(PAGE, PAGE.read_text(encoding="utf-8"), BEGIN, END, made)


if __name__ == "__main__":
    try:
        PAGE.write_text(filled(), encoding="utf-8")
    except ValueError as error:
        sys.exit(str(error))
