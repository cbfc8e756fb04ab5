"""The `vtoken` command as a person meets it: exit codes, one-sentence errors, answers and pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import vtoken
from vtoken.cli import cli
from vtoken.tiny.scenes import make_scene


def run(*arguments: str):
    return CliRunner().invoke(cli, list(arguments))


def test_list_names_every_strategy():
    assert run("list", "--names").output.split() == vtoken.list_strategies()
    shown = run("list").output
    assert all(name in shown for name in vtoken.list_strategies())
    assert run("list", "--names", "*cls*").output.split() == vtoken.list_strategies("*cls*")


def test_info_shows_paper_and_defaults():
    shown = run("info", "hired").output
    for words in ("2408.10945", "alpha", "0.5", "projector"):
        assert words in shown
    assert "baseline" in run("info", "random").output


@pytest.fixture
def scene_file(tmp_path):
    path = tmp_path / "scene.png"
    make_scene(5, "test").image.resize((150, 110)).save(path)
    return str(path)


def test_demo_answers_and_draws(tmp_path):
    out = tmp_path / "kept.png"
    result = run("demo", "--output", str(out), "--budget", "0.25", "--strategy", "vtc_cls", "--seed", "3")
    assert result.exit_code == 0, result.output
    for words in ("vtoken report: vtc_cls(budget=0.25", "144 -> 36 visual tokens", "true answer", str(out)):
        assert words in result.output.replace("\n", ""), words
    with Image.open(out) as picture:
        assert picture.width > 700 and len(picture.getcolors(maxcolors=1 << 20)) > 100


def test_demo_takes_an_image_and_a_question(scene_file, tmp_path):
    out = tmp_path / "kept.jpg"
    asked = ("--image", scene_file, "--question", "where is the red one?", "--budget", "40")
    result = run("demo", *asked, "--strategy", "pool", "--output", str(out))
    assert result.exit_code == 0, result.output
    assert "where is the red one?" in result.output and "true answer" not in result.output
    assert "144 -> 36 visual tokens" in result.output and out.is_file()


def test_demo_runs_any_folder_with_a_model(scene_file, tmp_path):
    from vtoken import tiny

    asked = ("--model", str(tiny.path()), "--image", scene_file, "--question", "how many objects are there?")
    result = run("demo", *asked, "--strategy", "fastv", "--output", str(tmp_path / "kept.png"))
    assert result.exit_code == 0, result.output
    assert "fastv" in result.output


def test_demo_joins_two_strategies(tmp_path):
    asked = ("--strategy", "visionzip+fastv", "--question", "how many objects are there?")
    result = run("demo", *asked, "--output", str(tmp_path / "kept.png"))
    assert result.exit_code == 0, result.output
    assert "visionzip" in result.output and "fastv" in result.output and "per LLM layer" in result.output


def test_bench_prints_a_ratio_per_case():
    result = run("bench", "--strategy", "uniform", "--budget", "0.5", "--budget", "16", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert "144 -> 72" in result.output and "144 -> 16" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "--image", "nowhere.png"), "no image file 'nowhere.png'"),
        (("demo", "--image", "{text}"), "not an image"),
        (("demo", "--image", "{folder}"), "no image file"),
        (("demo", "--image", "{broken}"), "cannot be read"),
        (("demo", "--strategy", "hirde"), "did you mean hired"),
        (("demo", "--budget", "0"), "at least 1"),
        (("demo", "--budget", "-0.2"), "(0, 1]"),
        (("demo", "--budget", "1.5"), "(0, 1]"),
        (("demo", "--budget", "nan"), "no number"),
        (("demo", "--budget", "few"), "no number"),
        (("demo", "--seed", "-1"), "--seed"),
        (("demo", "--output", "nowhere/at/all.png"), "does not exist"),
        (("demo", "--output", "{folder}/picture.txt"), "picture file"),
        (("demo", "--model", "{folder}"), "Cannot load the model"),
        (("demo", "--model", "{text}", "--image", "{image}", "--question", "what?"), "Cannot load the model"),
        (("demo", "--model", "x", "--image", "{image}"), "--question"),
        (("bench", "--strategy", "nothing_like_it"), "Unknown strategy"),
        (("bench", "--repeats", "0"), "--repeats"),
        (("info", "vtc-cls"), "did you mean vtc_cls"),
        (("list", "zzz*"), "No strategy matches"),
        (("eval", "tiny", "--strategies", "hirde"), "did you mean hired"),
        (("eval", "tiny", "--budgets", "0"), "at least 1"),
        (("eval", "tiny", "--questions", "0"), "--questions"),
        (("nonsense",), "No such command"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, tmp_path, scene_file):
    text, broken = tmp_path / "text.png", tmp_path / "broken.png"
    text.write_text("this is no picture")
    broken.write_bytes(Path(scene_file).read_bytes()[:400])
    places = {"text": text, "folder": tmp_path, "broken": broken, "image": scene_file}
    result = run(*(a.format(**places) for a in arguments))
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output and result.output.count("Error:") == 1


def test_starting_the_command_imports_nothing_heavy():
    code = "import sys, vtoken.cli; assert not {'transformers', 'matplotlib', 'rich', 'timm'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
