"""Import the scripts of benchmarks/ that a test module names in `NAMES`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripts(request, monkeypatch):
    """The modules, in the order of `NAMES`; they are imported anew for every test."""
    names = request.module.NAMES
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield [importlib.import_module(name) for name in names]
    for name in names:
        sys.modules.pop(name, None)
