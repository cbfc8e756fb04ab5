"""The streaming benchmark runs and reports its measurements."""

from __future__ import annotations

import json
import sys

from benchmarks import streaming


def test_benchmark(tmp_path, monkeypatch):
    out = tmp_path / "streaming.json"
    sessions = ["session, no strategy", "session, rekv and stc"]
    asked = ["--frames", "9", "24", "--plain", "12", "--repeats", "1"]
    monkeypatch.setattr(
        sys, "argv", ["streaming", "--shape", "tiny", *asked, "--out", str(out), "--only", *sessions]
    )
    streaming.main()
    result = json.loads(out.read_text())
    for name in sessions:
        short, long = result[name]
        assert (short["frames"], long["frames"]) == (9, 24)
        assert long["frame_flops"] > 0 and long["first_token_s"]["median"] > 0
    assert long["prompt_tokens"] <= result["about"]["max_tokens"]
    assert (
        result["session, rekv and stc"][0]["memory_bytes"] > result["session, no strategy"][0]["memory_bytes"]
    )
    assert [row["first_token_s"] is None for row in result["all frames"]] == [False, True]
    assert [row["frames_used"] for row in result["sampled frames"]] == [9, 16]
    assert result["machine"]["type"] == "cpu"
