"""The `vtoken` command for its users: exit codes, one-sentence errors, answers and pictures."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import vtoken
from vtoken import tiny
from vtoken.asking import TINY_KNOWS
from vtoken.bench.shapes import build
from vtoken.cli import compare, demo
from vtoken.cli.main import cli
from vtoken.eval.running.answer_log import locked
from vtoken.tiny.scenes import make_scene

ROOT = Path(__file__).parents[2]


def run(*arguments: str):
    return CliRunner().invoke(cli, list(arguments))


def test_list_names_every_strategy():
    assert run("list", "--names").output.split() == vtoken.list_strategies()
    shown = run("list").output
    assert all(name in shown for name in vtoken.list_strategies())
    assert run("list", "--names", "*cls*").output.split() == vtoken.list_strategies("*cls*")


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        (("eval", "mme"), "--strategy", ["fastv", "uniform+fastv", "hired"]),
        (("eval", "mme"), "--budgets", ["0.5", "0.2"]),
        (("eval", "imagenet"), "--flops", ["0.7", "0.5"]),
        (("eval", "tiny"), "--model", ["llava", "qwen2_5_vl"]),
        (("compare",), "--strategies", ["farcover", "divprune"]),
        (("demo", "explore"), "--strategies", ["farcover", "divprune"]),
        (("bench",), "--strategy", ["farcover", "divprune"]),
        (("bench",), "--shape", ["llava-1.5-7b", "llava-next-7b"]),
    ],
)
def test_values_of_a_list_are_separated_by_commas_or_given_one_by_one(command, option, values):
    """Neither form may lose a value without a word: commands of this one program look alike to their users."""
    here = cli
    for name in command:
        here = here.get_command(None, name)
    (parameter,) = (p for p in here.params if option in p.opts)
    one_by_one = [word for value in values for word in (option, value)]
    for given in ([option, ",".join(values)], one_by_one, [option, ", ".join(values)]):
        assert here.make_context(command[-1], given).params[parameter.name] == values


def test_info_shows_paper_and_defaults():
    shown = run("info", "hired").output
    for words in (
        "2408.10945",
        "alpha",
        "0.5",
        "projector",
        "budget counts",
        "visual tokens that enter the LLM",
    ):
        assert words in shown
    assert "baseline" in run("info", "random").output
    assert "baseline" not in run("info", "farcover").output


@pytest.fixture(autouse=True)
def small_shape(monkeypatch):
    monkeypatch.setattr("vtoken.cli.demo.SCALE", "tiny")


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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("llava", "qwen2_5_vl") else pytest.mark.product)
        for n in tiny.names()
    ],
)
@pytest.mark.parametrize("strategy", ["divprune", pytest.param("uniform+fastv", marks=pytest.mark.product)])
def test_demo_takes_tiny_models_by_name(name, strategy, tmp_path):
    out = tmp_path / "kept.png"
    result = run("demo", "--model", name, "--strategy", strategy, "--budget", "0.5", "--output", str(out))
    assert result.exit_code == 0, result.output
    assert "true answer" in result.output and out.is_file()
    asked = ("--strategy", strategy, "--budget", "0.5", "--repeats", "1", "--decode", "1")
    result = run("bench", "--model", name, *asked)
    assert result.exit_code == 0 and f"tiny-{name}" in result.output, result.output


def test_demo_says_what_a_tiny_model_shows_and_measures_a_real_shape(tmp_path):
    result = run("demo", "--output", str(tmp_path / "kept.png"), "--question", "how many objects are there?")
    said = " ".join(result.output.split())
    assert result.exit_code == 0, result.output
    assert "say nothing about speed" in said
    assert (
        "llava-1.5-7b, tiny scale: 8 LLM layers of width 32 in place of 32 of width 4096, random weights"
        in said
    )
    assert re.search(r"\d+% of the LLM's FLOPs; the prompt is read in \d+ ms of processor time", said)


@pytest.mark.parametrize(
    ("strategy", "budget", "share"),
    [("uniform", 0.5, 0.6), ("random", 1.0, 1.0), ("uniform+fastv", 0.25, 0.6)],
)
def test_the_share_of_a_real_shape_is_that_of_its_flops(strategy, budget, share):
    said = demo.at_a_real_shape(strategy, budget)
    found = int(re.search(r"(\d+)% of the LLM's FLOPs", said).group(1)) / 100
    work = build(demo.SHAPE, demo.SCALE)
    names = strategy.split("+")
    with (
        torch.inference_mode(),
        vtoken.applied(work.model, names if len(names) > 1 else names[0], budget=budget),
    ):
        work.model(**work.inputs)
        report = vtoken.report(work.model)
    assert found == pytest.approx(report.flops / report.flops_dense, abs=0.006) and found <= share


def test_a_strategy_that_refuses_a_real_shape_says_so():
    assert "not measured. vidcom2 is defined for video input" in demo.at_a_real_shape("vidcom2", 0.5)


def test_demo_joins_two_strategies(tmp_path):
    asked = ("--strategy", "visionzip+fastv", "--question", "how many objects are there?")
    result = run("demo", *asked, "--output", str(tmp_path / "kept.png"))
    assert result.exit_code == 0, result.output
    assert "visionzip" in result.output and "fastv" in result.output and "per LLM layer" in result.output


def test_bench_prints_a_ratio_per_case():
    asked = ("--strategy", "uniform", "--budget", "0.5", "--budget", "16", "--repeats", "1", "--decode", "1")
    result = run("bench", "--model", "llava", *asked)
    assert result.exit_code == 0, result.output
    assert "144 -> 72" in result.output and "144 -> 16" in result.output
    assert "mostly overhead" in result.output  # and nobody takes its times for those of a real model


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "--image", "{text}"), "not an image"),
        (("demo", "--image", "{broken}"), "cannot be read"),
        (("demo", "--strategy", "hirde"), "did you mean hired"),
        (("demo", "--budget", "0"), "at least 1"),
        (("demo", "--budget", "-0.2"), "(0, 1]"),
        (("demo", "--budget", "1.5"), "(0, 1]"),
        (("demo", "--budget", "nan"), "no number"),
        (("demo", "--budget", "few"), "no number"),
        (("demo", "--seed", "-1"), "--seed"),
        (("demo", "--output", "{folder}/picture.txt"), "picture file"),
        (("demo", "--model", "{folder}"), "Cannot load the model"),
        (("demo", "--model", "x", "--image", "{image}"), "--question"),
        (("bench", "--strategy", "nothing_like_it"), "Unknown strategy"),
        (("bench", "--repeats", "0"), "--repeats"),
        (("info", "vtc-cls"), "did you mean vtc_cls"),
        (("info", "visionzip+hired"), "only one can"),
        (("demo", "--strategy", "visionzip+"), "Names of strategies are joined as in"),
        (("list", "zzz*"), "No strategy matches"),
        (("eval", "tiny", "--strategies", "hirde"), "did you mean hired"),
        (("eval", "tiny", "--budgets", "0"), "at least 1"),
        (("eval", "tiny", "--questions", "0"), "--questions"),
        (("nonsense",), "No such command"),
        (("demo", "--budget", "0.2", "--seed", "1", "--budget", "0.5"), "--budget takes one value, found 2"),
        (("eval", "mme", "--example", "--model", "a", "--model", "b"), "--model takes one value, found 2"),
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "--image", "nowhere.png"), "no image file 'nowhere.png'"),
        (("demo", "--image", "{folder}"), "no image file"),
        (("demo", "--output", "nowhere/at/all.png"), "does not exist"),
        (("demo", "--model", "{text}", "--image", "{image}", "--question", "what?"), "Cannot load the model"),
        (("bench", "--plot", "nowhere/plot.png"), "does not exist"),
        (("bench", "--model", "no/such/model"), "Cannot load the model"),
        (("bench", "--compare", "no.json", "no.json"), "no report of `vtoken bench --output`: no such file"),
        (
            ("eval", "mme", "--data", "no_such_folder", "--output", "{folder}/o"),
            "no data set folder 'no_such_folder'",
        ),
        (("eval", "mme", "--example", "--output", "{text}/o"), "{text}"),
        (("eval", "tiny", "--output", "{text}/o.md"), "{text}"),
    ],
)
def test_what_the_environment_lacks_is_one_sentence_and_exit_code_1(
    arguments, words, tmp_path, scene_file, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = tmp_path / "text.png"
    text.write_text("this is no picture")
    places = {"text": text, "folder": tmp_path, "image": scene_file}
    result = run(*(a.format(**places) for a in arguments))
    assert result.exit_code == 1, result.output
    assert words.format(**places) in "".join(result.output.split("\n")) + " ".join(result.output.split())
    assert (
        "Traceback" not in result.output
        and result.output.count("Error:") == 1
        and "Usage:" not in result.output
    )


class Hub(Exception):
    """As the client of the Hub raises them."""


Hub.__module__ = "httpx._exceptions"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "kept.png"),
            1,
            "No space left on device: 'kept.png'.",
        ),
        (OSError(errno.EADDRINUSE, "Address already in use"), 1, "Address already in use."),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 1, "Permission denied: '/root/x'."),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            1,
            "Out of memory: CUDA out of memory.",
        ),
        (MemoryError(), 1, "Out of memory."),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            1,
            "Out of memory: DefaultCPUAllocator",
        ),
        (Hub("timed out"), 1, "The network did not answer: timed out."),
        (ImportError("This needs x."), 1, "This needs x."),
        (ValueError("budget is wrong"), 2, "budget is wrong"),
        (NotImplementedError("not with this cache"), 2, "not with this cache"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else None,
)
def test_any_command_tells_errors_apart(error, code, words, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("vtoken.cli.demo.run", fail)
    monkeypatch.setattr("vtoken.bench.run.run", fail)
    monkeypatch.setattr("vtoken.strategies.registry.parse_strategy", fail)
    for arguments in (("demo",), ("bench",), ("eval", "mme"), ("eval", "tiny", "--strategies", "hired")):
        result = run(*arguments)
        assert result.exit_code == code and f"Error: {words}" in result.output, result.output
        assert ("Usage:" in result.output) == (code == 2)


def test_a_fault_of_the_program_is_no_sentence(monkeypatch):
    monkeypatch.setattr("vtoken.cli.demo.run", lambda *args, **kwargs: {}["missing"])
    assert isinstance(run("demo").exception, KeyError)


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (("bench", "--plot", "plot.png"), "matplotlib", "demo"),
        (("eval", "mme", "--budgets", "0.5,0.2"), "matplotlib", "eval"),
        (("eval", "mme", "--example"), "pyarrow", "eval"),
        (("eval", "videomme"), "av", "eval"),
        (("eval", "videomme", "--subtitles", "both"), "pysubs2", "eval"),
        (("eval", "tiny"), "matplotlib", "eval"),
        (("demo", "stream", "--no-open"), "gradio", "stream"),
        (("demo", "explore", "--no-open"), "gradio", "stream"),
        (("demo", "stream", "--source", "clip.mp4", "--terminal"), "av", "stream"),
    ],
)
def test_a_missing_package_is_named_before_the_work(arguments, package, extra, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    loaded = []
    monkeypatch.setattr("vtoken.tiny.load", lambda *args, **kwargs: loaded.append(args))
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert f"needs {package}, which" in " ".join(result.output.split()), result.output
    assert f"pip install 'vtoken[{extra}]'" in " ".join(result.output.split())
    assert not loaded and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("given", "page"),
    [
        ((), "vtoken-tiny/board.md"),
        (("--output", "mine"), "mine/board.md"),
        (("--output", "a/my.md"), "a/my.md"),
    ],
)
def test_eval_tiny_writes_where_it_says_and_nowhere_else(given, page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "board.md").write_text("somebody's own page")
    asked = ("--strategies", "uniform+fastv", "--budgets", "0.5", "--questions", "5", *given)
    result = run("eval", "tiny", *asked)
    assert result.exit_code == 0, result.output
    folder = page.removesuffix(".md")
    assert f"the page is going to be {page}" in result.output and f"wrote {page}" in result.output
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {
        "docs/board.md",
        page,
        *(f"{folder}/{name}" for name in ("llava.json", "llava.png", ".lock")),
    }
    assert (tmp_path / "docs" / "board.md").read_text() == "somebody's own page"
    assert "uniform+fastv" in (tmp_path / page).read_text()


def test_a_second_eval_tiny_in_a_folder_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    heard = []
    with locked(tmp_path / "vtoken-tiny" / "board"):
        thread = threading.Thread(target=lambda: heard.append(run("eval", "tiny", "--strategies", "uniform")))
        thread.start()
        thread.join()
    assert heard[0].exit_code == 1 and "Another evaluation writes into" in " ".join(heard[0].output.split())


def test_processes_without_accelerate_do_not_all_do_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("eval", "mme", "--example", "--output", str(tmp_path / "out"))
    assert result.exit_code == 1 and "needs accelerate" in result.output and not [*tmp_path.iterdir()]


HELP = """
import sys
from vtoken.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {"torch", "transformers", "matplotlib", "rich", "timm", "numpy", "PIL", "gradio", "av"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "command",
    [
        "",
        "list",
        "info",
        "demo",
        "demo explore",
        "demo stream",
        "bench",
        "eval",
        "eval mme",
        "eval videomme",
        "eval tiny",
    ]
    + ["eval imagenet", "eval retrieval", "train", "compare", "ask", "board", "board submit"],
)
def test_help_imports_nothing_heavy(command):
    done = subprocess.run(
        [sys.executable, "-c", HELP, *command.split(), "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert f"Usage: vtoken {command}".strip() in done.stdout and "Options:" in done.stdout


def test_every_command_has_a_help_page_that_is_tested():
    commands = {"list", "info", "ask", "board", "compare", "demo", "bench", "eval", "train"}
    assert set(cli.list_commands(None)) == commands
    assert set(cli.get_command(None, "demo").list_commands(None)) == {"explore", "stream"}
    assert set(cli.get_command(None, "board").list_commands(None)) == {"submit"}
    assert set(cli.get_command(None, "eval").list_commands(None)) == {
        "mme",
        "videomme",
        "tiny",
        "imagenet",
        "retrieval",
    }


def test_info_of_two_strategies():
    result = run("info", "visionzip+fastv")
    assert result.exit_code == 0, result.output
    assert "2412.04467" in result.output and "2403.06764" in result.output
    assert 'vtoken.patch(model, ["visionzip", "fastv"], budget=0.2)' in result.output


def test_compare_prints_answers_and_draws_what_is_kept(tmp_path):
    picture = tmp_path / "kept.png"
    shown = run("compare", "--strategies", "divprune,visionzip+fastv,uniform", "--output", str(picture))
    assert shown.exit_code == 0, shown.output
    for words in (
        "where is the",
        "divprune",
        "visionzip+fastv",
        "uniform",
        "144",
        "100 %",
        "yes",
        "KV cache",
    ):
        assert words in shown.output
    assert "visionzip+fastv: the budget counts" in shown.output and "uniform: the" not in shown.output
    assert TINY_KNOWS not in shown.output
    with Image.open(picture) as drawn:
        assert drawn.width > 3 * 288 and drawn.height > 2 * 288  # all tokens and three strategies


@pytest.mark.parametrize("command", [("compare", "--strategies", "uniform"), ("demo",)])
def test_a_tiny_model_asked_about_a_picture_of_ones_own_says_what_it_knows(command, tmp_path, scene_file):
    shown = run(*command, "--image", str(scene_file), "--output", str(tmp_path / "kept.png"))
    assert shown.exit_code == 0, shown.output
    assert TINY_KNOWS in " ".join(shown.output.split())


def test_compare_draws_all_crops_of_all_tokens(tmp_path):
    picture = tmp_path / "kept.png"
    options = ("--model", "llava_next", "--strategies", "uniform", "--budget", "1.0")
    assert run("compare", *options, "--output", str(picture)).exit_code == 0
    with Image.open(picture).convert("RGB") as drawn:
        width, gap = (drawn.width - 36) // 2, 12
        panels = [drawn.crop((x, 80, x + width, drawn.height)) for x in (gap, 2 * gap + width)]
    assert panels[0].tobytes() == panels[1].tobytes()  # the budget keeps all, so both show the same


def test_compare_refuses_a_strategy_before_it_asks(tmp_path, monkeypatch):
    monkeypatch.setattr("vtoken.asking.ask", lambda *_: pytest.fail("the model was asked"))
    for model, last, words in (
        ("llava", "visionzip+evs", "evs"),
        ("qwen2_5_vl", "v_cast", "v_cast is defined for video input, and vtoken compare asks about an image"),
        ("qwen2_5_vl", "hired", "hired needs"),
    ):
        asked = ("--model", model, "--strategies", f"uniform,{last}", "--output", str(tmp_path / "kept.png"))
        shown = run("compare", *asked)
        assert shown.exit_code == 2 and words in " ".join(shown.output.split()), shown.output


@pytest.mark.parametrize(("model", "count"), [("llava", 5), ("qwen2_5_vl", 5)])
def test_compare_chooses_five_that_fit(model, count):
    chosen = compare.usual(tiny.load(model)[0])
    assert len(chosen) == count and "uniform" in chosen
    assert set(chosen) <= set(vtoken.list_strategies(model=tiny.load(model)[0]))


def test_compare_chooses_none_for_videos_alone(monkeypatch):
    monkeypatch.setattr(compare, "USUAL", ())
    monkeypatch.setattr(compare, "COUNT", 99)
    assert not {"evs", "flashvid", "v_cast", "vidcom2"} & set(compare.usual(tiny.load("qwen2_5_vl")[0]))


def test_compare_refuses_in_one_sentence(tmp_path, scene_file):
    wrong = {
        "unknown strategy": ("--strategies", "divprun"),
        "does not exist": ("--output", str(tmp_path / "none" / "kept.png")),
        "does not name a picture": ("--output", str(tmp_path / "kept.txt")),
        "kept.psd' does not name a picture": ("--output", str(tmp_path / "kept.psd")),  # Pillow only reads it
        "hired needs": ("--strategies", "hired", "--model", "qwen2_5_vl"),
        "budget": ("--budget", "0.0"),
    }
    for words, options in wrong.items():
        shown = run("compare", *options)
        assert shown.exit_code and words.lower() in shown.output.lower(), shown.output
    before = Path(scene_file).read_bytes()
    for command in ("compare", "demo"):
        shown = run(command, "--image", scene_file, "--output", str(tmp_path / "." / "scene.png"))
        assert shown.exit_code == 2 and "is the picture that is asked about" in " ".join(shown.output.split())
    assert Path(scene_file).read_bytes() == before
    shown = run("compare", "--image", str(scene_file), "--output", str(tmp_path / "own.png"))
    assert shown.exit_code == 0 and "how many objects" in shown.output


def test_options_in_a_name_reach_the_strategy(tmp_path):
    names = "random,random(seed=7),visionzip+fastv(layer=1)"
    out = run("compare", "--strategies", names, "--budget", "0.3", "--output", str(tmp_path / "a.png")).output
    assert "random(seed=7)" in out and "visionzip+fastv(layer=1)" in out
    given = ["--example", "--strategy", "random,random(seed=7)", "--budget", "0.05"]
    run("eval", "mme", *given, "--output", str(tmp_path / "mme"))
    runs = json.loads((tmp_path / "mme" / "results.json").read_text())["runs"]
    assert [r["run"]["strategy"] for r in runs] == ["random", "random(seed=7)"]
    assert runs[0]["wrong"] != runs[1]["wrong"]
