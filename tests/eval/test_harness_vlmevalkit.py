"""The VLMEvalKit launcher, on a stand-in package with VLMEvalKit's layout."""

from __future__ import annotations

import json
import re
import sys

import pytest

import vtoken
from vtoken import tiny
from vtoken.eval.harness.vlmevalkit import load_run, main, register
from vtoken.tiny.questions import answers
from vtoken.tiny.scenes import held_out

CONFIG = """
from functools import partial
from vtoken import tiny

class Tiny:
    def __init__(self, model_path, **kwargs):
        self.model, self.processor = tiny.load(model_path)
        self.kwargs = kwargs

class Api:
    def __init__(self, model, **kwargs):
        self.model = model

supported_VLM = {"tiny_llava": partial(Tiny, model_path="llava"), "gpt": partial(Api, model="gpt")}
"""
RUN = """
import argparse, json, sys
from vlmeval.config import supported_VLM
from vtoken.tiny.questions import answers
from vtoken.tiny.scenes import held_out

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--work-dir")
    args = parser.parse_args()
    for name in args.model:
        try:
            made = supported_VLM[name](use_vllm=False)
            said = answers(made.model, made.processor, held_out(3, int(args.data[0])), batch_size=1)
        except Exception as error:
            print(f"{error}, skipping this combination")
            continue
        with open(f"{args.work_dir}/{name}.json", "w") as out:
            json.dump(said, out)
"""


@pytest.fixture
def kit(tmp_path, monkeypatch):
    """A checkout; importing from it is undone afterwards."""
    (tmp_path / "kit" / "vlmeval").mkdir(parents=True)
    (tmp_path / "kit" / "vlmeval" / "__init__.py").touch()
    (tmp_path / "kit" / "vlmeval" / "config.py").write_text(CONFIG)
    (tmp_path / "kit" / "run.py").write_text(RUN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "kit"
    for name in [n for n in sys.modules if n.partition(".")[0] in ("vlmeval", "vlmevalkit_run")]:
        del sys.modules[name]


def test_runs_patched_twins_at_every_budget(kit, tmp_path, capsys):
    before = list(sys.argv)
    given = ["--strategy", "fastv", "--budget", "0.25", "36", "--option", "layer=1", "--model", "tiny_llava"]
    main([*given, "--kit", str(kit), "--data", "7", "--work-dir", str(tmp_path)])
    assert sys.argv == before
    printed, (model, processor) = capsys.readouterr().out, tiny.load("llava")
    for budget in (0.25, 36):
        twin = f"tiny_llava-vtoken-fastv-{budget}-layer=1"
        with vtoken.applied(model, "fastv", budget=budget, layer=1):
            said = answers(model, processor, held_out(3, 7), batch_size=1)
            tokens = vtoken.report(model).average_visual_tokens
        assert json.loads((tmp_path / f"{twin}.json").read_text()) == said
        assert f"{twin}: vtoken: 3 calls, 144.0 -> {tokens:.1f} visual tokens" in printed


def test_a_model_that_cannot_be_patched_ends_the_run(kit, tmp_path):
    given = [
        "--strategy",
        "hired",
        "--model",
        "gpt",
        "--kit",
        str(kit),
        "--data",
        "7",
        "--work-dir",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit, match=r"gpt cannot be patched: .*str"):
        main(given)


@pytest.mark.parametrize(
    "given, sentence",
    [
        (["--strategy", "hired", "--model", "tiny_lava"], "no model 'tiny_lava'.*tiny_llava"),
        (["--strategy", "hierd", "--model", "tiny_llava"], "hired"),
        (["--strategy", "hired", "--model", "tiny_llava", "--config", "x.json"], "use --model and --data"),
    ],
)
def test_bad_input_gets_a_sentence(kit, capsys, given, sentence):
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--kit", str(kit)])
    assert re.search(sentence, capsys.readouterr().err.replace("\n", " "))


def test_without_vlmevalkit_it_says_how_to_get_it(kit, tmp_path):
    with pytest.raises(ImportError, match=r"clone github\.com/open-compass/VLMEvalKit"):
        load_run(str(tmp_path))
    (kit / "run.py").unlink()
    with pytest.raises(ImportError, match=r"No run\.py beside"):
        load_run(str(kit))


def test_register_leaves_the_models_alone():
    supported = {"a": dict}
    assert register(supported, ["a"], {"strategy": "hired"}) == ["a-vtoken-hired"]
    assert supported["a"] is dict and set(supported) == {"a", "a-vtoken-hired"}
