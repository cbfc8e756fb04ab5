"""Weights of strategies that ship for the tiny models, and their recipe."""

from __future__ import annotations

import inspect
import json

import pytest

import vtoken
from training.compressors.train import BUDGETS, PLAN, train
from vtoken import tiny
from vtoken.tiny.questions import answers, held_out, score


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("llava_onevision", "pvc"), ("llava_onevision", "voco"), ("qwen2_5_vl", "llava_mini")],
)
def test_the_shipped_weights_hold_what_pooling_loses(name, strategy):
    """On clips at a sixteenth of the tokens, where the model pooled alike answers hardly better than blind."""
    model, processor = tiny.load(name)
    config = vtoken.VTokenConfig.from_pretrained(tiny.trained(name)[strategy])
    pairs = [pair for pair in held_out(name, 120, 5) if isinstance(pair[0].media, list)]

    def right(given):
        with vtoken.applied(model, given, budget=0.0625):
            said = answers(model, processor, pairs)
            return score(pairs, said)["all"], vtoken.report(model)

    (trained, report), (pooled, same) = right(config), right("pool")
    stored = report.tokens_per_layer[0] if strategy == "voco" else report.tokens_out
    assert stored == (same.tokens_per_layer[0] if strategy == "voco" else same.tokens_out)
    assert trained > 0.7 and trained > pooled + 0.25


def test_every_shipped_folder_is_small_and_names_its_strategy():
    folders = [folder for name in tiny.names() for folder in tiny.trained(name).values()]
    assert folders
    for folder in folders:
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        assert {"vtoken_config.json", "vtoken_strategy.safetensors", "training_log.json"} <= set(files)
        assert files["vtoken_strategy.safetensors"] <= 2 * 2**20
        assert json.loads((folder / "training_log.json").read_text())["accuracy"].keys() == set(
            map(str, BUDGETS)
        )
    assert tiny.trained("llava") == {}


def test_the_recipe_runs_and_goes_on(tmp_path, monkeypatch):
    if "mm_encoder_outputs" not in inspect.signature(tiny.load("llava_onevision")[0].forward).parameters:
        pytest.skip("the recipe hands features to the model, which this release does not take")
    monkeypatch.setitem(PLAN, "steps", 2)
    monkeypatch.setitem(PLAN, "batch", 2)
    report = train("pvc", out=tmp_path, questions=4)
    assert report["accuracy"].keys() == set(map(str, BUDGETS)) and report["recipe"]["steps"] == 2
    again = train("pvc", out=tmp_path, questions=4, resume=True)
    assert again["accuracy"] == report["accuracy"]
    with pytest.raises(KeyError):
        train("hired", out=tmp_path)
