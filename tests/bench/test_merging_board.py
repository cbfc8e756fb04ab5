"""Parts of benchmarks/merging_board.py, with a fake patch."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def board(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("merging_board")
    sys.modules.pop("merging_board", None)


@contextmanager
def blind(model, strategy, options):
    """A patch that takes the picture away; tome refuses shares below a half."""
    if strategy == "tome" and options["flops"] < 0.5:
        raise ValueError("tome cannot reach this share")
    hook = (getattr(model, "visual", None) or model).register_forward_pre_hook(
        lambda module, inputs: (torch.zeros_like(inputs[0]),)
    )
    try:
        yield
    finally:
        hook.remove()


FAKE = {
    "apply": blind,
    "report": lambda model: SimpleNamespace(gflops=0.1, gflops_dense=0.2, tokens_per_layer=[5, 4]),
}


def test_tempme_is_told_the_frames(board):
    chosen = board.video_settings((0.5,))
    assert all(options["frames"] == 12 for strategy, options in chosen if strategy == "tempme")
    assert chosen[0] == ("tempme", {"frames": 12, "r": 0}) and chosen[-1] == ("tome", {"flops": 0.5})


def test_speed_compares_with_the_plain_model_in_turns(board, monkeypatch):
    inside, calls = [], []

    @contextmanager
    def block():
        inside.append(1)
        yield
        inside.pop()

    monkeypatch.setattr(board, "seconds", lambda call: call() or (1.0 if inside else 3.0))
    assert board.speed(block, lambda: calls.append(bool(inside)), 3) == 3.0
    assert calls == [False, True] * 4


def test_rows_of_images(board, tmp_path, monkeypatch):
    from vtoken.tiny import load_encoder

    monkeypatch.setattr(board, "BATCH", 8)
    monkeypatch.setattr(board, "IMAGE", ("tome", "random_merge"))
    model, preprocess, _ = load_encoder("vit")
    rows = board.image_rows(model, preprocess, 24, 1, (0.5, 0.3), **FAKE)
    first, good, refused = rows[:3]
    assert first["strategy"] == "unpatched" and first["gflops"] == 0.2
    assert first["top1"] > 60 > 20 > good["top1"] and good["gflops"] == 0.1 and good["speed"] > 0
    assert "cannot reach" in refused["refused"] and "gflops" not in refused
    assert len(rows) == 1 + 2 * len(board.IMAGE)
    board.draw({"vit": rows}, tmp_path / "board.png")
    assert (tmp_path / "board.png").stat().st_size > 1000


@pytest.mark.product
def test_rows_of_videos(board, tmp_path, monkeypatch):
    from vtoken.tiny import load_encoder

    monkeypatch.setattr(board, "CLIPS", 4)
    rows = board.video_rows(*load_encoder("clip"), 12, 1, (0.5,), **FAKE)
    assert [row["strategy"] for row in rows] == ["unpatched", *["tempme"] * len(board.TEMPME), "tome"]
    assert rows[0]["rsum"] > 400 > rows[1]["rsum"]
    assert rows[0]["gflops"] == pytest.approx(2.4) and rows[1]["gflops"] == pytest.approx(1.2)
    board.draw({"clip": rows}, tmp_path / "board.png")


def test_rows_of_training(board):
    from vtoken.tiny import load_encoder

    pytest.importorskip("peft")
    merged, plain = board.trained_rows(*load_encoder("clip"), 4, steps=2, batch=2)
    assert merged["strategy"] == "tempme, trained" and plain["strategy"] == "unpatched, trained"
    assert 0 < merged["gflops"] < plain["gflops"] and all(0 <= r["rsum"] <= 600 for r in (merged, plain))
