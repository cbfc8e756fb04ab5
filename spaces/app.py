"""The page of a Hugging Face Space: questions to a synthetic stream, and the accuracy boards.

python spaces/app.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from vtoken.asking import load
from vtoken.cli.page_visitors import Desks
from vtoken.cli.stream import EXAMPLES, PAGE_BYTES, SESSIONS, STRATEGIES, TINY, TINY_STEPS, make_session
from vtoken.cli.stream_page import CSS, build_page
from vtoken.cli.stream_visitors import Desk
from vtoken.eval.board import page, submission

HERE = Path(__file__).parent
# beside this file in a Space, see `make space`; else in the repository
PAGES = (HERE / "board.md", HERE.parent / "docs" / "board.md")


def session(strategy: str, budget: float) -> Any:
    """One visitor's session: of a model of its own, with a bounded memory."""
    model, processor = load(None, TINY)
    bytes_of_one = PAGE_BYTES // SESSIONS
    return make_session(model, processor, strategy, budget, max_steps=TINY_STEPS, max_bytes=bytes_of_one)


def leaderboard() -> str:
    """Markdown: the order of the strategies and the submissions, of docs/board.md without its plots."""
    text = next(path for path in PAGES if path.is_file()).read_text(encoding="utf-8")
    ranks = page.made(text, page.SUMMARY, page.SUMMARY_END)
    sent = page.made(text, submission.BEGIN, submission.END)
    return re.sub(r"^!\[.*\n+", "", f"{ranks}\n\n## Submissions\n\n{sent}\n", flags=re.M)


def build(desks: Desks) -> gr.Blocks:
    """The page of `vtoken demo stream` with the boards below it, not yet served."""
    blocks = build_page(desks, [*STRATEGIES], examples=EXAMPLES)
    with blocks:
        gr.Markdown(f"## Accuracy boards\n\n{leaderboard()}", elem_id="board")
    return blocks


def main() -> None:
    desks = Desks(lambda: Desk(session), SESSIONS)
    try:
        build(desks).launch(css=CSS, ssr_mode=False, max_file_size=1, footer_links=[])
    finally:
        desks.close()


if __name__ == "__main__":
    main()
