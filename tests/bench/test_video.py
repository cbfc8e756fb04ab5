"""The benchmark of the way from a video file to an answer runs, and its rows take the same frames."""

from __future__ import annotations

import json
import sys

import numpy as np

NAMES = ("video", "video_clips", "video_plot", "video_answers")


def test_benchmark(scripts, tmp_path, monkeypatch):
    video, _, plot, _ = scripts
    out, whole = tmp_path / "video.json", "scaled, still_patches, farcover"
    arguments = ["--scale", "tiny", "--models", "llava-onevision-7b-video", "--kinds", "slides", "--rows"]
    arguments += ["sampled decoding", whole, "--frames", "4", "--seconds", "1", "--size", "96", "128"]
    monkeypatch.setattr(
        sys, "argv", ["video.py", *arguments, "--steps", "2", "--repeats", "1", "--out", str(out)]
    )
    video.main()
    report = json.loads(out.read_text())
    plain, dense, short = report["rows"]
    assert [r["row"] for r in report["rows"]] == ["plain", "sampled decoding", whole]
    assert dense["frames"] == short["frames"] == 4 and dense["prompt_tokens"] == short["prompt_tokens"]
    assert short["visual_tokens"] < 0.3 * dense["prompt_tokens"] and plain["speed"] == 1
    assert all(r["seconds"]["total"] > r["seconds"]["tower"] > 0 for r in report["rows"])
    plot.draw([report], tmp_path / "stages.png")
    assert (tmp_path / "stages.png").stat().st_size > 1000


def test_answers(scripts, monkeypatch, tmp_path):
    script, out = scripts[3], tmp_path / "answers.json"
    arguments = ["--models", "llava_onevision", "--n", "4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["video_answers.py", *arguments])
    script.main()
    dense, pruned, whole = json.loads(out.read_text())["rows"]
    assert [r["asked"] for r in (dense, pruned, whole)] == [2, 2, 2] and dense["right"] >= 1
    assert 0 < whole["computed"] < 1 and pruned["visual_tokens"] == whole["visual_tokens"]


def test_kinds_of_clips(scripts):
    _, clips, *_ = scripts
    changed = {}
    for kind in clips.KINDS:
        first, second = clips.frames(kind, 2, 10, (96, 128))
        assert first.shape == (96, 128, 3) and first.dtype == np.uint8
        changed[kind] = float((first != second).any(-1).mean())
    assert changed["slides"] == 0 < changed["talking head"] < 0.3 < 0.9 < changed["hand-held"]
