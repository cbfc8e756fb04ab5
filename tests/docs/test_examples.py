"""The example scripts run as their first lines say, and print what they promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vtoken.tiny.scenes import make_scene

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quickstart(capsys):
    load("quickstart").main([])
    said = capsys.readouterr().out
    yellow = next(item for item in make_scene(0, "test").objects if item.colour == "yellow")
    assert f"all tokens: {yellow.place}" in said and f"hired 0.2: {yellow.place}" in said
    assert "144 -> 28 visual tokens" in said


def test_quickstart_with_an_image_of_ones_own(tmp_path, capsys):
    make_scene(1, "test").image.resize((200, 120)).save(tmp_path / "mine.png")
    load("quickstart").main(["--image", str(tmp_path / "mine.png"), "--strategy", "fastv", "--budget", "0.5"])
    assert "fastv(" in capsys.readouterr().out


def test_batch(capsys):
    load("batch").main()
    said = capsys.readouterr().out
    assert "[(0, 144, 72), (1, 144, 72), (1, 144, 72), (3, 144, 72)]" in said
    assert "[(0, 144, 16), (1, 144, 16), (1, 144, 16), (3, 144, 16)]" in said
    assert said.count("144 -> 36 visual tokens") == 4 and "vtc_cls(budget=0.25, layers=2)" in said
