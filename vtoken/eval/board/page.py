"""The page of the boards: a generated summary and tables, each between two marks; other text is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .board import Board, Cell, key
from .ranking import LEEWAY, ranking

BEGIN, END = "<!-- board: made by the command below -->", "<!-- board: end -->"
SUMMARY, SUMMARY_END = "<!-- summary: made by the command below -->", "<!-- summary: end -->"
KINDS_AT = 0.2
RANKS = (
    "Over the boards below and all budgets; 1 is the best. A cell counts if it reads at most"
    f" {LEEWAY} times the tokens of its budget and is ranked among those of its board and budget that count;"
    " *cells* is their number, so that few cells are few comparisons. Baselines are in italics."
)


def summary(boards: Sequence[Board], command: str, pictures: Sequence[str]) -> str:
    """Markdown: the order of strategies over several boards, and a plot of each board."""
    lines = [f"Made by `{command}`.", ""]
    if len(boards) > 1:
        lines += ["### Mean rank at equal tokens", "", RANKS, "", *ranking(boards), ""]
    for board, picture in zip(boards, pictures, strict=True):
        lines += [f"![accuracy against kept tokens, {board.title}]({picture})", ""]
    return "\n".join(lines)


def tables(boards: Sequence[Board]) -> str:
    """Markdown, by board: accuracy by strategy and budget, and kinds of question at one budget."""
    lines = []
    for board in boards:
        settings = ", ".join(f"{key} {value}" for key, value in board.settings.items())
        lines += [f"### {board.title}", "", f"{settings}.", ""]
        dense = board.at.get(key("dense", 1.0))
        if dense:
            lines += [f"All visual tokens: {entry(dense)}.", ""]
        lines += accuracy(board) + [""] + low(board)
        if any(c.budget == KINDS_AT for c in board.cells):
            lines += [
                "",
                f"Exact answers in % by kind of question, budget {KINDS_AT}:",
                "",
                *kinds(board, KINDS_AT),
            ]
        lines.append("")
    return "\n".join(lines)


def accuracy(board: Board) -> list[str]:
    """One row per strategy, one column per budget."""
    at = board.at
    lines = [
        row(["strategy", *(f"budget {b}" for b in board.budgets)]),
        row(["---"] * (len(board.budgets) + 1)),
    ]
    for name in board.names:
        cells = [at.get(key(name, b)) for b in board.budgets]
        shown = f"*{name}*" if any(c and c.baseline for c in cells) else name
        lines.append(row([shown, *(entry(c) if c else "" for c in cells)]))
    return lines


def kinds(board: Board, budget: float | int) -> list[str]:
    """One row per strategy, one column per kind of question."""
    at, names = board.at, list(board.cells[0].kinds)
    lines = [
        row(["strategy", "tokens", "LLM FLOPs", *names]),
        row(["---", "---:", "---:", *["---:"] * len(names)]),
    ]
    for cell in (at.get(key("dense", 1.0)), *(at.get(key(name, budget)) for name in board.names)):
        if cell is not None:
            shares = (f"{100 * cell.kinds[k][0] / cell.kinds[k][1]:.1f}" for k in names)
            lines.append(row([cell.strategy, f"{cell.tokens:.1f}", f"{100 * cell.flops:.1f} %", *shares]))
    return lines


def low(board: Board) -> list[str]:
    """The cells below `random` at equal tokens, in words."""
    found = [
        f"{c.strategy} at {c.budget} ({100 * c.accuracy:.1f} with {c.tokens:.1f} tokens, random"
        f" {100 * chance:.1f})"
        for c, chance in board.below_random()
    ]
    return [f"Below *random* at equal tokens, whole interval: {'; '.join(found) or 'none'}."]


def entry(cell: Cell) -> str:
    bottom, top = cell.interval
    return f"{100 * cell.accuracy:.1f} [{100 * bottom:.1f}, {100 * top:.1f}] @ {cell.tokens:.1f}"


def row(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"


def write(page: Path, boards: Sequence[Board], command: str, pictures: Sequence[str]) -> None:
    """Replace the text between the marks of `page`; a page without marks gets them at its end.

    Raises:
        ValueError: if only one mark of a pair is there.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else "# The board\n"
    text = between(page, text, SUMMARY, SUMMARY_END, summary(boards, command, pictures))
    text = between(page, text, BEGIN, END, tables(boards))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")


def made(text: str, begin: str, end: str) -> str:
    """What stands between two marks of a page, "" if they are not there."""
    return text.partition(begin)[2].partition(end)[0].strip()


def between(page: Path, text: str, begin: str, end: str, new: str) -> str:
    """`text` with `new` between the marks, at its end if there are none."""
    if (begin in text) != (end in text):
        raise ValueError(f"{page} has one of the marks {begin!r} and {end!r}: put both, or none.")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    return f"{before.rstrip()}\n\n{begin}\n{new}\n{end}{after or chr(10)}"
