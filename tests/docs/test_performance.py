"""docs/performance.md and docs/streaming.md show the figures that are in benchmarks/results."""

from __future__ import annotations

import importlib.util

import pytest

from .test_guides import ROOT

SHOWN = {
    "performance": ("| hired | 0.1 |", "| farthest_point |", "| vtoken visionzip |"),
    "serving": ("| llava | vLLM |", "| qwen2_5_vl | divprune 0.25 |"),
    "streaming": ("| session, stc |", "| sampled frames |", "| only the latest half |"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_tables_are_fresh(name):
    spec = importlib.util.spec_from_file_location(
        "generate_performance", ROOT / "docs" / "generate_performance.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = ROOT / "docs" / f"{name}.md"
    text = path.read_text(encoding="utf-8")
    assert text == module.page(path), f"docs/{name}.md is stale: run python docs/generate_performance.py"
    assert all(line in text for line in SHOWN[name])
