"""The benchmarks of the KV cache run, and tell what the caches hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

NAMES = ("cache", "cache_answers")


def report(script, monkeypatch, out: Path, *arguments: str) -> dict[str, dict]:
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments, "--out", str(out)])
    script.main()
    return {row["row"]: row for row in json.loads(out.read_text())["rows"]}


def test_bytes_and_times(scripts, monkeypatch, tmp_path):
    script, out = scripts[0], tmp_path / "cache.json"
    asked = ["vidkv, 2 bits", "zipvl, 4 and 2 bits", "decode_evict, half", "sink_window of 512"]
    rows = report(
        script, monkeypatch, out, "--scale", "tiny", "--tokens", "1k", "--turns", "2", "--rows", *asked
    )
    full = rows[script.FULL]
    assert set(rows) == {script.FULL, *asked}
    # 1 key-value head of 16 channels, 8 layers, 16 bits; the prompt and 12 tokens of the answer
    assert full["bytes"] == (full["prompt"] + 12) * 16 * 2 * 2 * 8 and full["speed"]["median"] == 1
    assert rows["vidkv, 2 bits"]["times_fewer_bytes"] == pytest.approx(4.7, abs=0.1)
    assert rows["decode_evict, half"]["times_fewer_bytes"] == pytest.approx(1.95, abs=0.02)
    assert rows["sink_window of 512"]["times_fewer_bytes"] == pytest.approx(1.92, abs=0.02)
    assert all(row["ms_per_token"] > 0 and row["bytes"] <= full["bytes"] for row in rows.values())


def test_answers(scripts, monkeypatch, tmp_path):
    script, out = scripts[1], tmp_path / "answers.json"
    asked = ["full cache", "vidkv, 4 bits", "sink_window of 128"]
    arguments = ["--models", "llava_pages", "--n", "2", "--questions", "2", "--steps", "8", "--rows", *asked]
    full, packed, window = report(script, monkeypatch, out, *arguments).values()
    assert full["long"] == 1 and full["asked"] == 4 and "times_fewer_bytes" not in full
    assert full["prompt"] >= 0.75 and packed["after"] >= full["after"] - 0.25
    assert packed["times_fewer_bytes"] == pytest.approx(5.2, abs=0.2) and window["long"] < 1
