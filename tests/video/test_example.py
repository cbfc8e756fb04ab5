"""`examples/video.py` with a given model (untrained here) and a file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tests.video.media import write
from training.tiny.recipes import llava_onevision

EXAMPLE = Path(__file__).parents[2] / "examples" / "video.py"


def test_asking_about_a_file(tmp_path, capsys):
    model, processor = llava_onevision.build(width=32, tower_layers=1, llm_layers=1, heads=2)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    path = write(tmp_path / "clip.mp4", 24)
    spec = importlib.util.spec_from_file_location("example_video", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(
        ["--model", str(tmp_path / "model"), "--video", str(path), "--frames", "4", "--budget", "0.25"]
    )
    said = capsys.readouterr().out
    assert "4 of 24 frames over 1.0 s, read by pyav" in said
    assert "all tokens:" in said and "vidcom2 0.25:" in said and "visual tokens" in said
