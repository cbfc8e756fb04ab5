"""The public face: what `dir` shows, what type checkers see, and where old names went."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import vtoken
from vtoken.selection import Selection

ROOT = Path(vtoken.__file__).parents[1]
SNIPPET = """
from typing import assert_type

import vtoken
from vtoken.strategies import FastV, HiRED, Strategy

hired: Strategy = HiRED(budget=0.2)
assert_type(HiRED(budget=0.2), HiRED)
assert_type(vtoken.list_strategies(), list[str])
assert_type(vtoken.report(object()).tokens_in, int)
vtoken.patch(object(), FastV(budget=64))
from vtoken.strategies import Hired  # wrong
HiRED(budgets=0.2)  # wrong
"""
CONFIG = """
[mypy]
follow_imports = silent
[mypy-torch.*,transformers.*,numpy.*]
follow_imports = skip
"""


def test_every_name_is_there_and_dir_shows_it():
    assert set(vtoken.__all__) <= set(dir(vtoken))
    for name in vtoken.__all__:
        assert getattr(vtoken, name) is not None
    assert callable(vtoken.visualize) and callable(vtoken.patch)
    assert callable(vtoken.rates.learn_rates) and callable(vtoken.retrieval_training.train)
    assert vtoken.Selection is Selection


def test_a_type_checker_knows_the_strategies(tmp_path):
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    run = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "snippet.py"]
    env = os.environ | {"MYPYPATH": str(ROOT)}
    said = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True).stdout.splitlines()
    assert len(said) == 2, said
    assert 'has no attribute "Hired"' in said[0] and 'Unexpected keyword argument "budgets"' in said[1]


def test_the_stub_names_every_strategy():
    spec = importlib.util.spec_from_file_location("generate_stub", ROOT / "docs" / "generate_stub.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PLACE.read_text() == script.stub(), "run make docs"
