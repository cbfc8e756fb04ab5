"""Options in a strategy's name, as on the command line: "visionzip+fastv(layer=3)"."""

from __future__ import annotations

import json

import pytest

import vtoken
from tests.models import FAMILIES
from vtoken.cli.encoder_options import changes_nothing
from vtoken.eval.running.encoder_runs import EncoderRun
from vtoken.naming import split_options, split_outside
from vtoken.patching import patch_of
from vtoken.strategies import FastV, combine
from vtoken.strategies.registry import create, is_baseline, list_names, parse_strategy, strategy_info


def of_patch(strategy, **options):
    with vtoken.applied(FAMILIES["llava"].build(), strategy, **options) as model:
        return patch_of(model).strategy


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("fastv", {}),
        (" fastv ( ) ", {}),
        ("fastv(layer=3)", {"layer": 3}),
        ("fastv( layer = 3 , seed=-1)", {"layer": 3, "seed": -1}),
        ("hired(score=received)", {"score": "received"}),
        ("hired(score='received')", {"score": "received"}),
        ("diffrate(rates=ViT-S-DeiT/2.9)", {"rates": "ViT-S-DeiT/2.9"}),
        ("tempme(layers=[1,2], r=(3, 4))", {"layers": [1, 2], "r": (3, 4)}),
        ("x(a=true, b=False, c=null, d=None)", {"a": True, "b": False, "c": None, "d": None}),
        ("x(a=1e-3, b='a+b,c)')", {"a": 1e-3, "b": "a+b,c)"}),
    ],
)
def test_options_are_read(text, options):
    assert split_options(text) == (text.partition("(")[0].strip(), options)


@pytest.mark.parametrize(
    "inside",
    ["3", "layer", "**x", "*x", "layer=3, layer=4", "layer=3)(", "layer=3", "layer="]
    + ["a=" + "(" * 400 + ")" * 400, "a=" + "1" * 2000, "lambda: 3", "a.b=3", "\0", "# "],
)
def test_what_cannot_be_read_is_one_sentence(inside):
    text = f"fastv({inside}" + ")" * (inside != "layer=3")
    for use in (split_options, parse_strategy, create, of_patch):
        with pytest.raises(ValueError, match=r"^[^\n]*(fastv\(layer=3\)|layer must be|no option)[^\n]*\.$"):
            use(text)


def test_nothing_is_run():
    with pytest.raises(ValueError, match="must be one of cls, received"):
        of_patch("hired(score=print('run'))")
    assert split_options("x(a=open('file'))") == ("x", {"a": "open('file')"})


def test_separators_in_parentheses_separate_nothing():
    assert split_outside("a(x=1,y=[2,3]),b , c(z=(1,2))", ",") == ["a(x=1,y=[2,3])", "b", "c(z=(1,2))"]
    assert split_outside("a)b,c", ",") == ["a)b", "c"] and split_outside("", ",") == [""]
    assert parse_strategy("visionzip + fastv(layer=1e+0)") == ["visionzip", "fastv(layer=1e+0)"]


def test_it_is_the_strategy_of_these_options():
    assert (
        of_patch("fastv(layer=3)", budget=0.3)
        == of_patch("fastv", budget=0.3, layer=3)
        == FastV(0.3, layer=3)
    )
    assert of_patch("fastv(layer=1, budget=0.4)") == FastV(0.4, layer=1)
    want = combine(["visionzip", "fastv"], 0.3, fastv={"layer": 1})
    for given in ("visionzip+fastv(layer=1)", ["visionzip", "fastv(layer=1)"]):
        assert of_patch(given, budget=0.3).describe() == want.describe()
    assert of_patch(vtoken.VTokenConfig("random(seed=3)", 0.3)).describe() == "random(budget=0.3, seed=3)"
    assert strategy_info("fastv(layer=3)") is strategy_info("fastv")


def test_what_a_report_says_can_be_asked_for_again():
    for name in list_names():
        made = create(name)
        assert create(made.describe()).describe() == made.describe()
    made = create("random", budget=0.125, seed=4, positions="renumber")
    assert create(made.describe()) == made


def test_an_option_is_given_once():
    with pytest.raises(ValueError, match=r"^fastv is given layer twice, 1 and 2: leave one out\.$"):
        of_patch("fastv(layer=1)", layer=2)
    with pytest.raises(ValueError, match="fastv is given layer twice"):
        of_patch("visionzip+fastv(layer=1)", budget=0.3, fastv={"layer": 2})
    with pytest.raises(ValueError, match="fastv is given budget twice"):
        of_patch("fastv(budget=0.5)", budget=0.3)
    for given in (
        dict(strategy="visionzip+fastv(budget=0.9)"),
        dict(strategy="visionzip+fastv", fastv={"budget": 0.9}),
    ):
        with pytest.raises(
            ValueError, match=r"fastv has a budget of its own, 0\.9, and a part of budget=0\.3"
        ):
            of_patch(**given, budget=0.3)


def test_a_saved_config_has_the_options(tmp_path):
    config = vtoken.VTokenConfig.of(of_patch("fastv(layer=3)", budget=0.3))
    config.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "vtoken_config.json").read_text())
    assert told["strategy"] == "fastv" and told["options"] == {"layer": 3}


def test_options_and_joins_are_told_apart_from_the_method():
    assert is_baseline("random") and is_baseline("random(seed=1e+3)")
    assert not is_baseline("hired(score=received)") and not is_baseline("uniform+fastv")
    assert changes_nothing(EncoderRun("tome(r=0)")) and not changes_nothing(EncoderRun("tome(r=2)"))
    assert not changes_nothing(EncoderRun("tome(budget=0.5)", {"prop_attn": False}))
