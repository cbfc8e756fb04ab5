"""`vtoken eval mme` and `vtoken eval videomme` for their users, also under `accelerate launch`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from vtoken.asking import TINY_KNOWS
from vtoken.cli.main import cli

from .canned import mme_folder

ROOT = Path(__file__).parents[2]


def run(*arguments: str):
    return CliRunner().invoke(cli, ["eval", *arguments])


def answers(folder: Path) -> dict[str, dict[str, str]]:
    """Per run, the answer to each item."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found.setdefault(path.name.rsplit(".", 2)[0], {})[record["item"]] = record["answer"]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("mme") / "out"
    arguments = ("mme", "--example", "--budgets", "1.0,0.2", "--baselines", "random", "--output", str(out))
    return out, arguments, run(*arguments)


def test_mme_over_budgets(whole):
    out, _, result = whole
    assert result.exit_code == 0, result.output
    for words in ("perception", "28.0 of 144.0", "144.0 of 144.0", "random *", "TTFT", "results.png"):
        assert words in result.output, words
    stored = json.loads((out / "results.json").read_text())
    runs = {(r["strategy"], r["budget"]): r for r in stored["runs"]}
    assert list(runs) == [("dense", 1.0), ("hired", 0.2), ("random", 0.2)]
    assert stored["command"].startswith("vtoken eval mme --example --budgets 1.0,0.2 --baselines random")
    assert stored["settings"]["protocol"] == "strict" and stored["settings"]["questions"] == 16
    dense = runs["dense", 1.0]
    # the tiny LLaVA knows these questions; what it says is compared with its records
    said = answers(out)["all-visual-tokens"]
    right = sum(text == ("no" if i % 2 else "yes") for i, text in enumerate(said.values()))
    assert 16 - len(dense["wrong"]) == dense["right"] == right >= 14 and dense["scores"]["sum"] >= 300
    assert [runs[k]["tokens"] for k in runs] == [144, 28, 28] and all(r["ttft"] > 0 for r in runs.values())
    page = (out / "results.md").read_text()
    assert "| hired | 0.2 | 28.0 of 144.0 | 22.7 % |" in page and "- protocol: strict" in page
    assert "| existence | 8 |" in page and "results.png" in page
    with Image.open(out / "results.png") as plot:
        assert len(plot.convert("RGB").getcolors(maxcolors=1 << 20)) > 20


def test_a_tiny_model_asked_about_data_of_ones_own_says_what_it_knows(whole, tmp_path):
    out, _, first = whole
    given = ("--data", str(out / "example"), "--budget", "0.2", "--output", str(tmp_path / "out"))
    result = run("mme", *given)
    assert result.exit_code == 0 and TINY_KNOWS in " ".join(result.output.split()), result.output
    assert TINY_KNOWS not in " ".join(first.output.split())
    assert json.loads((tmp_path / "out" / "results.json").read_text())["title"] == "MME, tiny llava"


def test_a_command_without_a_plot_leaves_no_earlier_one(whole, tmp_path):
    out, _, _ = whole
    there = shutil.copytree(out, tmp_path / "out")
    result = run("mme", "--example", "--budget", "0.2", "--output", str(there))
    assert result.exit_code == 0, result.output
    assert (out / "results.png").is_file() and not (there / "results.png").exists()
    assert [r["strategy"] for r in json.loads((there / "results.json").read_text())["runs"]] == ["hired"]


def test_a_second_run_takes_the_answers_over(whole):
    out, arguments, first = whole
    before = {path: path.read_bytes() for path in out.glob("*.jsonl")}
    again = run(*arguments)
    assert again.exit_code == 0 and "hired 0.2: 16 answers are there already" in again.output
    assert {path: path.read_bytes() for path in out.glob("*.jsonl")} == before
    assert (
        again.output[again.output.index("MME, tiny llava") :]
        == first.output[first.output.index("MME, tiny llava") :]
    )
    other = run(*arguments, "--protocol", "lmms-eval")
    assert (
        other.exit_code == 2 and "max_new_tokens" not in other.output and "another --output" in other.output
    )


@pytest.mark.parametrize("kind", ["same", "frames"])
def test_videomme_with_frames(tmp_path, kind):
    options = {"same": ["--same-tokens-as", "2"], "frames": ["--frames", "2", "--subtitles", "both"]}[kind]
    budgets = ["--budgets", "1.0,0.5", "--baselines", "none"] if kind == "same" else ["--budget", "0.5"]
    result = run(
        "videomme",
        "--example",
        "--strategy",
        "uniform",
        *budgets,
        *options,
        "--output",
        str(tmp_path / "out"),
        "--batch-size",
        "2",
    )
    assert result.exit_code == 0, result.output
    folders = ["with_subtitles", "without_subtitles"] if kind == "frames" else ["."]
    for name in folders:
        stored = json.loads((tmp_path / "out" / name / "results.json").read_text())
        assert stored["settings"]["subtitles"] == (name == "with_subtitles")
        runs = [(r["strategy"], r["run"]["frames"], r["tokens"], r["tokens_in"]) for r in stored["runs"]]
        dense, more = [("dense", 2, 288, 288)], ("uniform", 4, 288, 576)
        assert runs == (dense + [more] if kind == "same" else [("uniform", 2, 144, 288)])
        assert set(stored["runs"][0]["scores"]["duration"]) == {"short", "medium", "long"}


def test_two_processes_give_what_one_gives(whole, tmp_path):
    out, _, _ = whole
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    asked = ["--example", "--budget", "0.2", "--output", str(tmp_path / "out")]
    made = subprocess.run(
        [sys.executable, *launch, "-m", "vtoken", "eval", "mme", *asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert len(list((tmp_path / "out").glob("hired-0.2.*.jsonl"))) == 2
    assert answers(tmp_path / "out")["hired-0.2"] == answers(out)["hired-0.2"]
    two, one = (
        json.loads((folder / "results.json").read_text())["runs"] for folder in (tmp_path / "out", out)
    )
    measured = ("ttft", "seconds")
    assert {k: v for k, v in two[0].items() if k not in measured} == {
        k: v for k, v in one[1].items() if k not in measured
    }
    assert made.stdout.count("perception") >= 1 and made.stdout.count("MME, tiny llava") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["videomme"], "Video-MME is not downloaded by this command: get it with hf download"),
        (["mme", "--data", "no_such_folder"], "There is no data set folder 'no_such_folder'"),
        (
            ["mme", "--example", "--budget", "0.2", "--budgets", "0.5"],
            "--budget and --budgets exclude each other",
        ),
        (["mme", "--example", "--strategy", "hirde"], "did you mean hired"),
        (["mme", "--example", "--budgets", "2.5"], "budget"),
        (["videomme", "--example", "--frames", "2", "--same-tokens-as", "2"], "exclude each other"),
        (["videomme", "--example", "--letters", "AAB"], "The letters of options are different capitals"),
        (["mme", "--example", "--protocol", "loose"], "strict"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code in (1, 2) and words in " ".join(result.output.replace("│", " ").split()), (
        result.output
    )
    assert "Traceback" not in result.output


def test_a_strategy_that_refuses_is_an_error_and_a_baseline_is_left_out(tmp_path):
    data = str(mme_folder(tmp_path))
    refused = run(
        "mme", "--data", data, "--strategy", "sparsevlm", "--budget", "0.1", "--output", str(tmp_path / "a")
    )
    assert refused.exit_code == 2 and "sparsevlm 0.1:" in refused.output
    beside = [
        "--budgets",
        "0.1",
        "--strategy",
        "uniform",
        "--baselines",
        "sparsevlm",
        "--output",
        str(tmp_path / "b"),
    ]
    result = run("mme", "--data", data, *beside)
    assert result.exit_code == 0 and "left out, sparsevlm 0.1:" in result.output, result.output
    assert len(json.loads((tmp_path / "b" / "results.json").read_text())["left_out"]) == 1


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    exec(compile(code, "docs/evaluation.md", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("all visual tokens 144.0 ") and second.startswith("hired 0.2 28.0 ")
