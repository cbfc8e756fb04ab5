"""docs/performance.md shows the figures that are in benchmarks/results."""

from __future__ import annotations

import importlib.util

from .test_guides import ROOT


def test_tables_are_fresh():
    spec = importlib.util.spec_from_file_location("generate_performance", ROOT / "docs" / "generate_performance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text(encoding="utf-8")
    assert text == module.page(), "docs/performance.md is stale: run python docs/generate_performance.py"
    assert all(line in text for line in ("| hired | 0.1 |", "| farthest_point |", "| vtoken visionzip |"))
