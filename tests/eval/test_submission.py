"""`vtoken board submit`: results with measured tokens pass, in one form; anything else gets one sentence."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from vtoken.cli.main import cli
from vtoken.cli.options import command_line
from vtoken.eval.board.board import Board
from vtoken.eval.board.submission import Submission, table

ROOT = Path(__file__).parents[2]
CELL = {
    **{"strategy": "hired", "budget": 0.2, "baseline": False, "tokens": 28.0, "tokens_in": 144.0},
    **{
        "flops": 0.23,
        "right": 12,
        "asked": 16,
        "kinds": {"existence": [6, 8], "color": [6, 8]},
        "seconds": 1.5,
    },
}
DENSE = CELL | {"strategy": "dense", "budget": 1.0, "baseline": True, "tokens": 144.0, "flops": 1.0}
SETTINGS = {
    **{
        "model": "llava",
        "task": "MME",
        "protocol": "strict",
        "questions": 16,
        "data": "0123",
        "dtype": "float32",
    },
    **{"vtoken": "0.1.0", "transformers": "5.24.0", "torch": "2.14.1", "python": "3.11.7"},
}
GOOD = {
    "title": "MME, llava",
    "command": "vtoken eval mme --data MME --budgets 1.0,0.2",
    "settings": SETTINGS,
    "runs": [DENSE, CELL | {"wrong": ["secret name"], "ttft": 0.1}],
    "left_out": [],
}


def changed(path: str, value: object) -> dict:
    """GOOD with the value at a dotted path; a value of None removes it."""
    made = copy.deepcopy(GOOD)
    *way, last = path.split(".")
    inner = made
    for part in way:
        inner = inner[int(part) if part.isdigit() else part]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return made


def submit(file: Path, *options: str):
    return CliRunner().invoke(cli, ["board", "submit", str(file), *options])


def written(folder: Path, values: object) -> Path:
    path = folder / "results.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def test_a_result_is_written_in_the_form_of_a_board(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = submit(written(tmp_path, GOOD))
    assert result.exit_code == 0 and "MME, llava, 2 cells of 16 questions" in result.output, result.output
    path = tmp_path / "docs" / "board" / "submissions" / "mme-llava.json"
    assert "secret" not in path.read_text() and "left_out" not in path.read_text()
    board = Board.load(path)
    assert [c.strategy for c in board.cells] == ["dense", "hired"] and board.command == GOOD["command"]
    again = Submission.load(path)
    assert again == Submission.from_dict(GOOD) and again.dataset == "MME"
    said = "\n".join(table([again]))
    assert (
        "### MME, llava" in said
        and f"Made by `{GOOD['command']}`: model llava, questions 16, task MME, protocol strict" in said
    )
    assert "| hired | 0.2 | 28.0 of 144.0 | 23.0 % | 75.0 [50.5, 89.8] |" in said and "| *dense* |" in said
    assert "A part of MME, which has 2,374, or other data. Made by" in said
    assert "A part" not in "\n".join(table([replace(again, questions=2374)]))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("runs.1.tokens", None, "'hired' at 0.2 has no measured visual tokens"),
        ("runs.1.tokens", 145.0, "read 145.0 of 144.0 visual tokens"),
        ("runs.1.tokens", 0, "read 0.0 of 144.0"),
        ("runs.0.tokens", 100.0, "dense read 100.0 of 144.0"),
        ("runs.1.right", 17, "0 <= right <= asked"),
        ("runs.1.right", 11, "has 11 of 16 right, its kinds 12 of 16"),
        ("runs.1.right", "12", "right must be a whole number"),
        ("runs.1.right", True, "right must be a whole number"),
        ("runs.1.right", 10**300, "right must be a whole number"),
        ("runs.1.kinds", {"a": [-1, 8], "b": [13, 8]}, "-1 of 8 right in a"),
        ("runs.1.flops", -1, "which cannot be"),
        ("runs.1.budget", 7.5, "budget"),
        ("runs.1.strategy", "<img src=x>", "no name of a strategy"),
        ("runs", [CELL, CELL], "hired at 0.2 is there twice"),
        ("runs", [], "from 1 to 1000 measured cells"),
        ("runs", [CELL] * 1001, "from 1 to 1000 measured cells"),
        ("runs", {"a": CELL}, "from 1 to 1000 measured cells"),
        ("runs", [3], "a cell must be a mapping"),
        ("runs", None, "neither 'runs' nor 'cells'"),
        ("settings", None, "'settings' must be a mapping"),
        ("settings", {str(i): i for i in range(41)}, "at most 40 entries"),
        ("settings.torch", None, "lack the version of torch"),
        ("settings.vtoken", 1, "lack the version of vtoken"),
        ("settings.model", None, "name no model"),
        ("settings.questions", None, "questions must be a whole number"),
        ("settings.questions", 17, "say 17 questions, a cell has 16"),
        ("settings.data", None, "do not tell the questions"),
        ("settings.data", [[1]], "the setting data must be"),
        ("settings.data", "x" * 201, "201 characters, more than 200"),
        ("title", None, "the title is not recorded"),
        ("title", "a | b", "'|', which a table cannot show"),
        ("title", "a\n\n<script>", "which a table cannot show"),
        ("title", ["a"], "the title must be a string"),
        ("command", None, "the command is not recorded: measure again"),
        ("command", "", "the command is not recorded: measure again"),
        ("command", "vtoken eval mme --example", "--example are no data set"),
        ("command", "rm -r docs", "must be one of vtoken eval"),
        ("command", "vtoken eval mme; rm -r docs", "must be one of vtoken eval and no more"),
        ("command", "vtoken eval mme $(rm docs)", "must be one of vtoken eval and no more"),
        ("command", "vtoken eval 'mme", "must be one of vtoken eval and no more"),
        ("command", "vtoken eval nothing", "must be one of mme, videomme, tiny"),
        ("command", f"vtoken eval mme --hub-token hf_{'a' * 30}", "a token of the Hub: take it out"),
        ("runs.1.flops", 1e300, "which cannot be"),
        ("runs.0.budget", 0.1, "dense has a budget of 0.1"),
        ("runs.0.budget", 1, "dense has a budget of 1 token"),
        ("runs.0.flops", 0.5, "dense has FLOPs of 0.5"),
        ("runs.1.tokens_in", 1e300, "which cannot be"),
        ("runs.1.strategy", "---", "no name of a strategy"),
        ("settings.questions", 2**62, "which cannot be"),
    ],
)
def test_what_cannot_be_submitted_gets_one_sentence(path, value, words, tmp_path):
    result = submit(written(tmp_path, changed(path, value)), "--to", str(tmp_path / "to"))
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and words in said and not (tmp_path / "to").exists(), said
    assert said.count("Error:") == 1 and "results.json' cannot be submitted:" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": 1e999}', "too large"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 50_000, "levels deep"),
        ("[" * 200 + "]" * 200, "levels deep"),
        ("[]", "must be a mapping"),
        ("null", "must be a mapping"),
    ],
)
def test_files_that_are_no_results(text, words, tmp_path):
    result = submit(written(tmp_path, text), "--to", str(tmp_path / "to"))
    assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output
    assert not (tmp_path / "to").exists()


def test_a_file_that_is_too_large_or_none_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("vtoken.eval.board.submission.MOST_BYTES", 100)
    assert "has more than the 100 bytes" in " ".join(submit(written(tmp_path, GOOD)).output.split())
    assert submit(tmp_path).exit_code == 2 and submit(tmp_path / "none.json").exit_code == 2
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in submit(tmp_path / "pipe").output


@pytest.mark.parametrize("name", ["../a", "a/b", "/a", "", ".a", "A", "a" * 65, "a\nb", "..", "a\\b"])
def test_a_name_leads_nowhere_else(name, tmp_path):
    result = submit(written(tmp_path, GOOD), "--to", str(tmp_path / "to"), f"--name={name}")
    assert result.exit_code == 2 and "A name has up to 64" in " ".join(result.output.split())
    assert [p.name for p in tmp_path.rglob("*")] == ["results.json"]


def test_nothing_is_overwritten(tmp_path):
    other = tmp_path / "other.txt"
    (tmp_path / "linked.json").symlink_to(other)
    for _ in range(2):
        result = submit(written(tmp_path, GOOD), "--to", str(tmp_path), "--name", "linked")
        assert result.exit_code == 2 and "is there already" in " ".join(result.output.split())
    assert not other.exists()
    assert submit(written(tmp_path, GOOD), "--to", str(tmp_path), "--name", "a.b-1").exit_code == 0
    assert (tmp_path / "a.b-1.json").is_file()


def test_a_name_of_any_title_is_one_that_is_taken():
    for title in ("../../etc/passwd", "MME, llava-hf/llava-1.5-7b-hf", "...", "x" * 200):
        assert Submission.from_dict(changed("title", title)).name in (
            *("passwd", "mme-llava-hf-llava-1-5-7b-hf", "results", "x" * 64),
        )


def test_a_folder_of_the_senders_machine_is_left_out():
    made = changed("title", "MME, /home/somebody/llava")
    made["settings"]["model"] = "/home/somebody/llava"
    told = Submission.from_dict(made)
    made["settings"]["file"] = "../somebody/x.tsv"
    made["command"] = "vtoken eval mme --data=/home/somebody/MME/ --model /home/somebody/llava --output out/a"
    told = Submission.from_dict(made)
    assert (told.title, told.model) == ("MME, llava", "llava") and told.settings["file"] == "x.tsv"
    assert told.command == "vtoken eval mme --data=MME --model llava --output out/a"
    assert "somebody" not in json.dumps(told.to_dict())


PATHS = (
    "/home/somebody/x",
    "./../somebody/x",
    "a/../../somebody/x",
    "file:///home/somebody/x",
    "a,/home/somebody/x",
    "a, /home/somebody/my x",
    "at /home/somebody/x",
    "x:y=/home/somebody/x",
    "~somebody/x",
    "C:\\Users\\somebody\\x",
    "..\\somebody\\x",
    "\\\\server\\somebody\\x",
)
PLAIN = (
    "llava-hf/llava-1.5-7b-hf",
    "out/a",
    "https://host/a/b.tsv",
    "a,b",
    "yes / no",
    "~100",
    "0.2",
    "hf://a/b",
)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("place", ["settings.file", "settings.model", "title", "command"])
def test_no_folder_outside_is_told(place, path):
    value = f"vtoken eval mme --data {shlex.quote(path)}" if place == "command" else path
    told = json.dumps(Submission.from_dict(changed(place, value)).to_dict())
    assert "somebody" not in told and "Users" not in told and "x" in told


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_folder_outside_stays(text):
    told = Submission.from_dict(changed("settings.file", text))
    assert told.settings["file"] == text
    command = f"vtoken eval mme --data {shlex.quote(text)}"
    assert Submission.from_dict(changed("command", command)).command == command


def test_commands_record_what_was_asked():
    told = []

    @click.command(context_settings={"ignore_unknown_options": True})
    @click.argument("rest", nargs=-1, type=click.UNPROCESSED)
    def probe(rest: tuple[str, ...]) -> None:
        told.append(command_line())

    cli.add_command(probe, "probe")
    try:
        CliRunner().invoke(
            cli, ["probe", "--data", "/home/somebody/MME/", "--model=/m/llava", "a b", "--x=1"]
        )
    finally:
        cli.commands.pop("probe")
    assert told == ["vtoken probe --data MME --model=llava 'a b' --x=1"] and command_line() == ""


def test_the_page_of_submissions_is_fresh():
    spec = importlib.util.spec_from_file_location("generate_board", ROOT / "docs" / "generate_board.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    text = make.PAGE.read_text(encoding="utf-8")
    assert text == make.filled(), "docs/board.md is stale: run docs/generate_board.py"
