"""Reports of the benchmark: save, join, compare, judge, draw; and the command that makes them."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from vtoken.bench import report
from vtoken.cli.main import cli


def cell(strategy="hired", budget=0.2, total=50.0, kept=0.95, overhead=0.01, **more):
    one = {"median": 2.0, "q1": 1.9, "q3": 2.2}
    out = {
        "strategy": strategy, "budget": budget, "tokens": [576, 115.0], "flops": [4.0, 1.0], "kv_bytes": [8, 2],
        "peak_bytes": [10, 5], "ms_dense": {"tower": 20.0, "choose": 0.0, "llm": 70.0, "rest": 10.0, "total": 100.0},
        "ms": {"tower": 20.0, "choose": 1.0, "llm": 20.0, "rest": 9.0, "total": total},
        "promised": {"llm": 4.0, "prefill": 2.1}, "measured": {"llm": one, "prefill": one},
        "kept": {"llm": kept, "prefill": 0.9}, "overhead": {"median": overhead, "q1": 0.0, "q3": 0.1},
    }  # fmt: skip
    return out | more


def whole(*cells):
    return {
        "machine": report.machine(torch.device("cpu")),
        "shapes": {"s": {"scale": "cpu", "cells": list(cells)}},
    }


def test_save_and_load_and_what_is_no_report(tmp_path):
    path = tmp_path / "a.json"
    report.save(whole(cell()), path)
    assert report.load(path) == whole(cell()) and [*tmp_path.iterdir()] == [path]
    (tmp_path / "b.json").write_text('{"shapes": {}}')
    (tmp_path / "c.json").write_text("nonsense")
    for name in ("b.json", "c.json", "missing.json"):
        with pytest.raises(ValueError, match="no report"):
            report.load(tmp_path / name)


def test_compare_joins_cells_and_divides_times():
    a, b = (
        whole(cell(), cell(budget=0.5), cell(strategy="pool")),
        whole(cell(total=75.0), cell(budget=64), cell(budget=0.5)),
    )
    assert report.compare(a, b) == [
        ["s cpu", "hired", "0.2", "50.0", "75.0", "1.50", "2.00", "2.00"],
        ["s cpu", "hired", "0.5", "50.0", "50.0", "1.00", "2.00", "2.00"],
    ]
    with pytest.raises(ValueError, match="in common"):
        report.compare(
            whole(cell()), whole(cell(strategy="pool"), {"strategy": "hired", "budget": 0.2, "refused": "no"})
        )


def test_goals_are_judged_by_device():
    cells = [cell(kept=0.89, overhead=0.04), cell(), {"strategy": "x", "budget": 0.2, "refused": "no"}]
    assert [line.rpartition(": ")[2] for line in report.goals(cells, "cpu")] == [
        "1 of 2 cells",
        "2 of 2 cells",
    ]
    assert [line.rpartition(": ")[2] for line in report.goals(cells, "cuda")] == [
        "1 of 2 cells",
        "1 of 2 cells",
    ]


def test_tables_and_picture(tmp_path):
    cells = [cell(), cell(budget=0.5, decode={"median": 1.5, "q1": 1, "q3": 2}), {"refused": "no"}]
    first, second = report.rows(cells)
    assert first[0] == "hired" and "576 -> 115" in first and "-" in first and "1.9" in " ".join(first)
    assert len(first) == len(report.COLUMNS) and "1.50" in second
    text = report.markdown(["a", "b"], [["1", "2"]])
    assert text == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    report.draw(whole(*cells[:2]), tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_the_processor_is_named(monkeypatch, tmp_path):
    assert report.machine(torch.device("cpu"))["device"]
    monkeypatch.setattr(report, "Path", lambda _: tmp_path / "missing")
    assert report._processor()


def run(*arguments):
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


def test_the_command_measures_saves_joins_and_compares(tmp_path):
    out, picture = tmp_path / "r.json", tmp_path / "r.png"
    quick = (
        "--scale",
        "tiny",
        "--strategy",
        "uniform",
        "--budget",
        "0.5",
        "--repeats",
        "2",
        "--decode",
        "1",
        "--output",
        out,
    )
    for shape in ("llava-1.5-7b", "llava-onevision-7b-video"):
        result = run("--shape", shape, *quick, "--plot", picture)
        assert result.exit_code == 0, result.output
        assert shape in result.output and "uniform" in result.output
    shapes = json.loads(out.read_text())["shapes"]
    assert [*shapes] == ["llava-1.5-7b", "llava-onevision-7b-video"] and picture.is_file()
    assert (
        shapes["llava-1.5-7b"]["cells"][0]["measured"]["prefill"]["median"] > 0
        and "of 1 cells" in result.output
    )
    assert "1.00" in run("--compare", out, out).output
    other = json.loads(out.read_text())
    other["machine"]["device"] = "another machine"
    report.save(other, out)
    result = run("--shape", "llava-1.5-7b", *quick)
    assert result.exit_code == 2 and "another machine" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "llava"), "llava-1.5-7b"),
        (("--shape", "llava-1.5-7b", "--model", "x"), "either --shape or --model"),
        (("--shape", "llava-1.5-7b", "--strategy", "hirde"), "did you mean hired"),
        (("--scale", "huge"), "--scale"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words):
    result = run(*arguments)
    assert (
        result.exit_code == 2
        and words in " ".join(result.output.split())
        and "Traceback" not in result.output
    )
