"""Strategies and adapters of other packages: found by entry points, imported late, and harmless where they
are broken.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import vtoken
from tests.mechanism.common import run, subject
from tests.models import FAMILIES
from vtoken.adapters import registry as adapters
from vtoken.strategies import registry as strategies

from .common import answer, image, top

ROOT = Path(vtoken.__file__).parents[1]
STRATEGY = """
from dataclasses import dataclass

from vtoken import register
from vtoken.strategies import ScoredStrategy


@register("{name}", summary="For tests.", stages=("projector",), baseline=True)
@dataclass
class Toy(ScoredStrategy):
    power: float = {default}

    def scores(self, tokens):
        return tokens.by_cell(tokens.features.float().norm(dim=-1) ** self.power)
"""
ADAPTER = """
from vtoken.adapters.llava import LlavaAdapter
from vtoken.adapters.registry import register_adapter


@register_adapter
class ToyAdapter(LlavaAdapter):
    model_types = ("toy_vlm",)
"""


def install(folder: Path, package: str, entries: dict[str, dict[str, str]], **files: str) -> None:
    """A package of modules and the metadata that pip would write."""
    where, name = folder / package, package.replace("_", "-")
    where.mkdir(parents=True)
    for module, text in ({"__init__": ""} | files).items():
        (where / f"{module}.py").write_text(text)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in lines.items()) for g, lines in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(groups))


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A folder for packages; nothing has been looked up yet, and what is registered meanwhile goes."""
    adapters.list_families(), strategies.list_names()
    before = dict(strategies._registry), dict(adapters._adapters), set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (strategies, adapters):
        monkeypatch.setattr(registry.plugins, "loaded", False)
    yield tmp_path
    for table, was in zip((strategies._registry, adapters._adapters), before):
        table.clear()
        table.update(was)
    for module in set(sys.modules) - before[2]:
        if module.startswith("toy"):
            del sys.modules[module]


def listed(pattern="toy*"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = vtoken.list_strategies(pattern)
    return names, [str(w.message) for w in caught if "vtoken." in str(w.message)]


@pytest.mark.parametrize("value", ["toy_pkg.deep.methods", "toy_pkg.deep.methods:Toy", "toy_pkg"])
def test_a_module_or_a_class_joins(fresh, value):
    install(fresh, "toy_pkg", {"vtoken.strategies": {"toy": value}}, __init__="from .deep import methods")
    install(fresh / "toy_pkg", "deep", {}, methods=STRATEGY.format(name="toy", default=2.0))
    assert listed() == (["toy"], [])
    tokens = image(5, 5)
    made = vtoken.strategies.create("toy", budget=6)
    assert answer(made, tokens).keep.tolist() == top(tokens.features.norm(dim=-1), 6)
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    assert "toy" in vtoken.list_strategies(model=model)
    with vtoken.applied(model, "toy", budget=0.25, power=1.0), torch.no_grad():
        run(model, inputs, 1)
        assert str(vtoken.report(model)).startswith("vtoken report: toy(budget=0.25, power=1.0)")


def test_nothing_is_imported_before_a_name_is_looked_up_that_vtoken_does_not_have(fresh):
    install(
        fresh,
        "toy_late",
        {"vtoken.strategies": {"toy": "toy_late"}},
        __init__=STRATEGY.format(name="toy", default=1.0),
    )
    assert strategies.create("hired") and "toy_late" not in sys.modules
    assert strategies.create("toy").power == 1.0


FAILING = (
    STRATEGY.format(name="toy_bad", default=1.0)
    + """
    def __post_init__(self):
        raise RuntimeError("no")
"""
)
BROKEN = {
    "syntax": ("def (", "SyntaxError"),
    "import": (
        "import toy_that_is_not_there",
        "ModuleNotFoundError: No module named 'toy_that_is_not_there'",
    ),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "registers nothing": ("x = 1", "registers no strategy, found <module"),
    "name taken": (
        STRATEGY.format(name="hired", default=1.0),
        "name 'hired' is taken by vtoken.strategies.hired",
    ),
    "old vtoken": ("from vtoken.strategies import NotThere", "ImportError"),
    "cannot be made": (FAILING, "toy_bad() of its defaults fails with RuntimeError: no"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_gives_one_warning_that_names_it(fresh, case):
    text, words = BROKEN[case]
    entries = {"toy_a": "toy_broken.a", "toy_b": "toy_broken.b", "toy_c": "toy_broken:Missing"}
    install(fresh, "toy_broken", {"vtoken.strategies": entries}, a=text, b=text)
    install(
        fresh,
        "toy_good",
        {"vtoken.strategies": {"x": "toy_good"}},
        __init__=STRATEGY.format(name="toy", default=1.0),
    )
    names, said = listed()
    assert names == ["toy"] and len(said) == 1, said
    with pytest.raises(
        ValueError, match="The package toy-broken adds 'toy_a', which cannot be used: "
    ) as told:
        strategies.create("toy_a")  # the warning may be far above by then, or in another log
    assert words in str(told.value)
    assert said[0].startswith("The package toy-broken adds to vtoken.strategies") and words in said[0]
    assert "\n" not in said[0] and said[0].endswith(".") and "toy-good" not in said[0]
    assert listed() == (["toy"], []), "it is said once"
    with pytest.raises(ValueError, match="Unknown strategy 'toy_bad'"):
        strategies.create("toy_bad")


def test_a_class_that_only_inherits_from_a_dataclass_says_why_it_has_no_option(fresh):
    text = STRATEGY.format(name="toy", default=1.0).replace("@dataclass\n", "")
    install(fresh, "toy_bare", {"vtoken.strategies": {"toy": "toy_bare"}}, __init__=text)
    with pytest.raises(ValueError, match=r"no option 'power': it takes .*; write @dataclass above Toy"):
        strategies.create("toy", power=2.0)
    with pytest.raises(ValueError, match=r"no option 'powers': it takes [^;]*\.$"):
        strategies.create("toy", powers=2.0)


def test_two_names_with_a_comma_are_told_how_they_are_joined():
    with pytest.raises(ValueError, match=r"found 'hired,fastv': .* joined by \+, as in 'visionzip\+fastv'"):
        strategies.strategy_info("hired,fastv")


def test_a_package_that_looks_a_name_up_while_it_is_imported(fresh):
    text = "import vtoken\nfound = vtoken.list_strategies()\n" + STRATEGY.format(name="toy", default=1.0)
    install(fresh, "toy_curious", {"vtoken.strategies": {"toy": "toy_curious"}}, __init__=text)
    assert listed() == (["toy"], [])


def test_an_adapter_of_another_package(fresh):
    install(fresh, "toy_models", {"vtoken.adapters": {"toy": "toy_models.family"}}, family=ADAPTER)
    install(fresh, "toy_wrong", {"vtoken.adapters": {"toy": "toy_wrong"}})
    subject("llava")
    assert adapters.adapter_for(subject("llava")) and "toy_models" not in sys.modules
    with pytest.warns(
        UserWarning, match=r"package toy-wrong adds to vtoken\.adapters .*registers no adapter"
    ) as caught:
        assert "toy_vlm" in adapters.list_families()
    assert len(caught) == 1


SCRIPT = """
import sys, warnings
import vtoken, vtoken.strategies
from vtoken import tiny

assert "toy_pkg" not in sys.modules, "imported before it was needed"
{strategy}
model, processor = tiny.load("llava")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    names = vtoken.list_strategies(model=model)
assert {{"toy", "mine", "hired"}} <= set(names), names
assert len(caught) == 1 and "toy-broken" in str(caught[0].message), caught
vtoken.patch(model, "mine", budget=0.25)
print("served")
"""


def test_a_plain_script(tmp_path):
    """A user's case: no fixture, a fresh process, a strategy of the script itself and those of packages."""
    install(
        tmp_path,
        "toy_pkg",
        {"vtoken.strategies": {"toy": "toy_pkg"}},
        __init__=STRATEGY.format(name="toy", default=1),
    )
    install(
        tmp_path, "toy_broken", {"vtoken.strategies": {"broken": "toy_broken"}}, __init__="import nowhere"
    )
    mine = (
        textwrap.dedent(STRATEGY.format(name="mine", default=1))
        .replace("from vtoken import register", "")
        .replace("@register(", "@vtoken.register(")
    )
    (tmp_path / "script.py").write_text(SCRIPT.format(strategy=mine))
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; import runpy; runpy.run_path('script.py')"
    made = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert made.stdout == "served\n", made.stderr
