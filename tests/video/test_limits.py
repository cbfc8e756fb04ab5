"""A file says how large it is, and nothing is allocated because it says so: one sentence, and `limits` to go on."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.video.media import number, write
from vtoken.images import open_image
from vtoken.video import Limits, LiveReader, VideoError, open_video, sample_fps, sample_uniform

ROOT = Path(__file__).parents[2]


def png(width: int, height: int) -> bytes:
    """A sound header of one-bit pixels and few of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(2000))) + chunk(b"IEND", b"")
    )


def gif(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "GIF")
    data = bytearray(file.getvalue())
    struct.pack_into("<HH", data, 6, width, height)
    struct.pack_into("<HH", data, data.index(b"\x2c\0\0\0\0") + 5, width, height)
    return bytes(data)


def lasting(folder: Path, seconds: float) -> Path:
    """An mkv that states another duration (in its own milliseconds) than it has."""
    data = bytearray(write(folder / "a.mkv", 8).read_bytes())
    at = data.index(b"\x44\x89\x88") + 3
    struct.pack_into(">d", data, at, 1000 * seconds)
    path = folder / "lasting.mkv"
    path.write_bytes(data)
    return path


def spread(folder: Path) -> Path:
    """An mkv of which each frame lasts for half an hour."""
    return write(folder / "spread.mkv", 8, times=[i * 50_000 for i in range(8)])


def many(folder: Path) -> Path:
    """A small mp4 of 60 pictures that take 47 MB."""
    return write(folder / "many.mp4", [3] * 60, size=(640, 408))


def kept(folder: Path, data: bytes, name: str) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


HUGE = {
    "png": lambda d: kept(d, png(40_000, 40_000), "a.png"),
    "png called mp4": lambda d: kept(d, png(30_000, 30_000), "a.mp4"),
    "gif": lambda d: kept(d, gif(60_000, 30_000), "a.gif"),
}


@pytest.mark.parametrize("backend", ["pyav", "auto"])
@pytest.mark.parametrize("case", HUGE)
def test_pictures_that_are_too_large(tmp_path, case, backend):
    path = HUGE[case](tmp_path)
    with (
        pytest.raises(VideoError, match=r"67,108,864.*limits=Limits\(pixels=None\)"),
        open_video(path, backend) as video,
    ):
        list(video)
    with pytest.raises(VideoError), LiveReader(path, speed=None, timeout=1) as live:
        assert not list(live)
        raise VideoError("no frame")


def test_the_bound_on_pixels_is_exact(tmp_path):
    path = write(tmp_path / "a.mp4", 4, size=(144, 48))
    for limits in (Limits(pixels=144 * 48), Limits(pixels=None), None):
        with open_video(path, limits=limits) as video:
            assert [number(f.image[:, :128].copy()) for f in video] == [0, 1, 2, 3]
    less = Limits(pixels=144 * 48 - 1)
    with pytest.raises(VideoError, match="limits=Limits"), open_video(path, limits=less) as video:
        list(video)
    with pytest.raises(VideoError), LiveReader(path, speed=None, limits=less, timeout=1) as live:
        assert not list(live)
        raise VideoError("no frame")


def test_a_picture_that_grows_is_left_out(tmp_path):
    data = write(tmp_path / "a.ts", 8).read_bytes() + write(tmp_path / "b.ts", 8, size=(640, 408)).read_bytes()
    path = kept(tmp_path, data, "grows.ts")
    with open_video(path, limits=Limits(pixels=128 * 48)) as video:
        assert {f.image.shape for f in video} == {(48, 128, 3)} and video.damage


@pytest.mark.parametrize("make", [lambda d: lasting(d, 1e12), lambda d: lasting(d, 1e7), spread])
def test_a_time_that_nothing_fills(tmp_path, make):
    with open_video(make(tmp_path)) as video:
        assert len(sample_uniform(video, 4)) <= 4
        assert video.duration > 10_000
        with pytest.raises(VideoError, match=r"more than 4,194,304 frames.*limits=Limits\(frames=None\)"):
            sample_fps(video, 1000)


def test_more_frames_than_fit(tmp_path):
    path = many(tmp_path)
    assert path.stat().st_size < 100_000
    limits = Limits(nbytes=40 * 640 * 408 * 3)
    for backend in ("pyav", "decord"):
        with open_video(path, backend, limits=limits) as video:
            assert len(sample_uniform(video, 40)) == 40 and len(sample_fps(video, 10)) == 24
            for ask in (
                lambda v: sample_uniform(v, 41),
                lambda v: v.get_frames(range(60)),
                lambda v: sample_fps(v, 25),
            ):
                with pytest.raises(VideoError, match=r"frames take .* GiB.*limits=Limits\(nbytes=None\)"):
                    ask(video)
            assert sum(1 for _ in video) == 60  # nothing is held in passing
    with open_video(path, limits=Limits(frames=59)) as video, pytest.raises(VideoError, match="more than 59 frames"):
        video.get_frames([0])


def test_time(tmp_path):
    path = write(tmp_path / "a.ts", 8)
    for use in (list, lambda v: v.get_frames([0]), lambda v: sample_uniform(v, 2)):
        message = r"takes more than 1e-09 s.*limits=Limits\(seconds=None\)"
        with open_video(path, "pyav", limits=Limits(seconds=1e-9)) as video, pytest.raises(VideoError, match=message):
            use(video)
    with open_video(path, limits=Limits(seconds=None)) as video:
        assert len(list(video)) == 8


@pytest.mark.parametrize("name", ["pixels", "frames", "nbytes", "seconds"])
@pytest.mark.parametrize("value", [0, -1, "4", True, float("nan"), float("inf")])
def test_limits_are_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} is a number above 0, or None"):
        Limits(**{name: value})


def test_limits_are_limits(tmp_path):
    for wrong in (2**20, {"pixels": 3}, "none"):
        with pytest.raises(TypeError, match=r"a vtoken.video.Limits or None"):
            open_video(write(tmp_path / "a.mp4", 2), limits=wrong)


def test_pictures(tmp_path):
    path = kept(tmp_path, png(40_000, 40_000), "a.png")
    with pytest.raises(ValueError, match=r"cannot be read|more than"):
        open_image(path)
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(tmp_path / "b.png")
    assert open_image(tmp_path / "b.png", Limits(pixels=1500)).size == (50, 30)
    with pytest.raises(ValueError, match=r"50 x 30 pixels, more than 1,499"):
        open_image(tmp_path / "b.png", Limits(pixels=1499))


CODE = """
import resource, sys
from pathlib import Path
from tests.video import test_limits
from vtoken.video import VideoError, open_video, sample_fps, sample_uniform
folder = Path(sys.argv[1])
files = [make(folder) for make in test_limits.HUGE.values()] + [test_limits.lasting(folder, 1e12), test_limits.spread(folder)]
open_video(test_limits.many(folder)).get_frames([0, 59])  # what the libraries take for themselves
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in files:
    for use in (list, lambda v: sample_uniform(v, 8), lambda v: sample_fps(v, 2), len):
        try:
            with open_video(path) as video:
                use(video)
        except (VideoError, TypeError):
            pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_what_is_allocated(tmp_path):
    """In a process of its own, because a process remembers its largest size: MB beyond what a sound video takes."""
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) < 400
