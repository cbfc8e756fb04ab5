"""Results that somebody sends in for the board: a file of `vtoken eval`, checked, and written in one form."""

from __future__ import annotations

import re
import shlex
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._json import compact, read
from ...checks import fit, found
from ...strategies.budgets import Budget
from .board import Cell, key
from .outside import without_outside
from .page import row

# marks of docs/board.md around the table
BEGIN, END = "<!-- submissions: made by docs/generate_board.py -->", "<!-- submissions: end -->"
MOST_BYTES = 16 * 2**20  # of a file; the largest of Video-MME with ten runs has one
MOST_CELLS = 1000
MOST_SETTINGS = 40
LONGEST = 200  # characters of a title and of a setting
LONGEST_COMMAND = 1000
VERSIONS = ("vtoken", "transformers", "torch", "python")
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
STRATEGY = re.compile(r"[a-zA-Z][\w.+()=,' /-]{0,199}", re.ASCII)
COMMAND = "vtoken eval "
TASKS = ("mme", "videomme", "tiny")
TOKEN = re.compile(r"\bhf_\w{20,}")  # of the Hub
MOST_QUESTIONS, MOST_FLOPS = 10**7, 10.0  # FLOPs of a strategy against all tokens
MOST_TOKENS = 10**8  # of one question
PUBLISHED = {"MME": 2374, "Video-MME": 2700}  # questions; other numbers are a part, or data of one's own
PLAIN = frozenset(string.printable) - frozenset("\t\n\r\x0b\x0c`<>|[]*")  # what a table shows as it stands


@dataclass(frozen=True)
class Submission:
    """Checked results of one `vtoken eval`.

    Attributes:
        title: benchmark and model.
        dataset: what was asked, without the model.
        model: its Hub id or folder, or the name of a tiny one.
        command: the command that measured, as the file records it.
        questions: asked per cell.
        versions: of vtoken, transformers, torch and Python.
        settings: what else the file says, as words and numbers.
        cells: strategies and budgets, with the tokens that were read.
    """

    title: str
    dataset: str
    model: str
    command: str
    questions: int
    versions: dict[str, str]
    settings: dict[str, Any]
    cells: list[Cell]

    @classmethod
    def load(cls, path: str | Path) -> Submission:
        """Read a file of `vtoken eval`, or one that `save` wrote.

        Raises:
            OSError: if it cannot be read.
            ValueError: in one sentence, for anything else that it may be.
        """
        path = Path(path)
        if path.exists() and not path.is_file():
            raise ValueError(f"{found(str(path))} is no file.")
        values = read(path, MOST_BYTES)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{found(path.name)} cannot be submitted: {error}") from None

    @classmethod
    def from_dict(cls, values: Any) -> Submission:
        """Raises ValueError for values that are no results of `vtoken eval mme`, `videomme` or `tiny`."""
        values = fit("the file", values, dict)
        settings = _settings(values.get("settings"))
        if "runs" not in values and "cells" not in values:
            raise ValueError("it has neither 'runs' nor 'cells', so it is no result of vtoken eval.")
        cells = _cells(values.get("runs", values.get("cells")))
        command, title = _command(values.get("command")), _text("the title", values.get("title"))
        if not isinstance(model := settings.pop("model", None), str) or not model:
            raise ValueError("its settings name no model.")
        title = without_outside(title.replace(values["settings"]["model"], model))
        versions = {name: settings.pop(name, None) for name in VERSIONS}
        if missing := [name for name, value in versions.items() if not isinstance(value, str)]:
            raise ValueError(f"its settings lack the version of {', '.join(missing)}.")
        questions = fit("questions", settings.pop("questions", None), int)
        if not 0 < questions <= MOST_QUESTIONS:
            raise ValueError(f"its settings say {questions} questions, which cannot be.")
        if other := [cell.asked for cell in cells if cell.asked != questions]:
            raise ValueError(f"its settings say {questions} questions, a cell has {other[0]}.")
        if not {"data", "seed"} & set(settings):
            raise ValueError(
                "its settings do not tell the questions: neither their digest 'data' nor a 'seed'."
            )
        dataset = str(settings.get("task") or title)
        return cls(title, dataset, model, command, questions, versions, settings, cells)

    def to_dict(self) -> dict[str, Any]:
        """The form of a board's file, with the command; `from_dict` takes it."""
        cells = [cell.to_dict() for cell in self.cells]
        return {"title": self.title, "command": self.command, "settings": self.facts, "cells": cells}

    @property
    def facts(self) -> dict[str, Any]:
        """Model, number of questions, settings and versions."""
        return {"model": self.model, "questions": self.questions, **self.settings, **self.versions}

    @property
    def name(self) -> str:
        """A file name, without its ending, made of the title."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")[:64] or "results"

    def save(self, folder: str | Path, name: str | None = None) -> Path:
        """Write `folder/name.json`, which must not exist; folders are made if needed.

        Raises:
            ValueError: for a name that is not made of a-z, 0-9, "_", "-" and ".", or one that is taken.
        """
        name = self.name if name is None else name
        if not NAME.fullmatch(name):
            raise ValueError(
                "A name has up to 64 of a-z, 0-9, '_', '-' and '.', and begins with a letter or a digit,"
                f" found {found(name)}."
            )
        path = Path(folder) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(compact(self.to_dict()) + "\n")
        except FileExistsError:
            raise ValueError(f"{found(str(path))} is there already: give another --name.") from None
        return path


def table(submissions: Sequence[Submission]) -> list[str]:
    """Markdown lines: one row per cell, below each file's title the command that made it."""
    lines: list[str] = []
    for each in submissions:
        facts = ", ".join(f"{name} {value}" for name, value in each.facts.items())
        whole = PUBLISHED.get(each.dataset, each.questions)
        part = (
            ""
            if each.questions == whole
            else f"A part of {each.dataset}, which has {whole:,}, or other data. "
        )
        lines += [f"### {each.title}", "", f"{part}Made by `{each.command}`: {facts}.", ""]
        lines += [row(["strategy", "budget", "visual tokens", "LLM FLOPs", "right, % [95 %]"])]
        lines += [row(["---", "---:", "---:", "---:", "---:"])]
        for cell in each.cells:
            low, high = cell.interval
            lines.append(
                row(
                    [
                        f"*{cell.strategy}*" if cell.baseline else cell.strategy,
                        str(cell.budget),
                        f"{cell.tokens:.1f} of {cell.tokens_in:.1f}",
                        f"{100 * cell.flops:.1f} %",
                        f"{100 * cell.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                    ]
                )
            )
        lines.append("")
    return lines


def _text(name: str, value: Any, most: int = LONGEST) -> str:
    if value is None or value == "":
        raise ValueError(f"{name} is not recorded: measure again with this version of vtoken.")
    text = fit(name, value, str)
    if len(text) > most:
        raise ValueError(f"{name} has {len(text)} characters, more than {most}.")
    if odd := next((c for c in text if c not in PLAIN), None):
        raise ValueError(f"{name} has the character {odd!r}, which a table cannot show as it stands.")
    return text


def _command(value: Any) -> str:
    command = _text("the command", value, LONGEST_COMMAND)
    try:
        plain = command == shlex.join(shlex.split(command))
    except ValueError:
        plain = False
    if not plain or not command.startswith(COMMAND):
        raise ValueError(f"the command must be one of {COMMAND.strip()} and no more, found {found(command)}.")
    words = shlex.split(command)
    if words[2] not in TASKS:
        raise ValueError(f"the command must be one of {', '.join(TASKS)}, found {found(words[2])}.")
    if "--example" in words:
        raise ValueError("the generated questions of --example are no data set.")
    if TOKEN.search(command):
        raise ValueError("the command has a token of the Hub: take it out, and revoke it.")
    return shlex.join(map(without_outside, words))


def _settings(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > MOST_SETTINGS:
        raise ValueError(f"'settings' must be a mapping of at most {MOST_SETTINGS} entries.")
    out = {}
    for name, each in value.items():
        name = _text("the name of a setting", name)
        if isinstance(each, str):
            each = without_outside(_text(f"the setting {name}", each)) if each else each
        else:
            each = fit(f"the setting {name}", each, bool | int | float | None)
        out[name] = each
    return out


def _cells(value: Any) -> list[Cell]:
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_CELLS:
        raise ValueError(f"it needs from 1 to {MOST_CELLS} measured cells.")
    cells = [_cell(each) for each in value]
    keys = [key(cell.strategy, cell.budget) for cell in cells]
    if len(set(keys)) < len(keys):
        strategy, budget, _ = next(each for each in keys if keys.count(each) > 1)
        raise ValueError(f"{strategy} at {budget} is there twice.")
    return cells


def _cell(value: Any) -> Cell:
    if isinstance(value, dict) and "tokens" not in value:
        said = f"{found(value.get('strategy'))} at {found(value.get('budget'))}"
        raise ValueError(f"{said} has no measured visual tokens, and a budget alone does not tell them.")
    cell = Cell.from_dict(value)
    name = f"{found(cell.strategy)} at {cell.budget}"
    if not STRATEGY.fullmatch(cell.strategy):
        raise ValueError(f"{name} is no name of a strategy.")
    if not 0 < cell.tokens <= cell.tokens_in:
        raise ValueError(f"{name} read {cell.tokens} of {cell.tokens_in} visual tokens, which cannot be.")
    if cell.strategy == "dense" and cell.tokens != cell.tokens_in:
        raise ValueError(f"dense read {cell.tokens} of {cell.tokens_in} visual tokens, it reads all.")
    if cell.strategy == "dense" and (cell.budget != 1.0 or not Budget(cell.budget).is_share):
        unit = "" if Budget(cell.budget).is_share else " token"
        raise ValueError(f"dense has a budget of {cell.budget}{unit}, it reads all.")
    if cell.strategy == "dense" and cell.flops != 1.0:
        raise ValueError(f"dense has FLOPs of {cell.flops}, against which those of the others are counted.")
    if not 0 < cell.flops <= MOST_FLOPS or cell.seconds < 0 or cell.tokens_in > MOST_TOKENS:
        raise ValueError(
            f"{name} has FLOPs of {cell.flops}, {cell.seconds} seconds and {cell.tokens_in} visual tokens,"
            " which cannot be."
        )
    sums = tuple(sum(counts) for counts in zip(*cell.kinds.values())) or (cell.right, cell.asked)
    if sums != (cell.right, cell.asked):
        raise ValueError(f"{name} has {cell.right} of {cell.asked} right, its kinds {sums[0]} of {sums[1]}.")
    for kind, (right, asked) in cell.kinds.items():
        _text("a kind of question", kind)
        if not 0 <= right <= asked:
            raise ValueError(f"{name} has {right} of {asked} right in {kind}.")
    return cell
