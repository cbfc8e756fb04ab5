"""Declared sizes: nothing is allocated because a file says so; one sentence, and `limits` to lift it."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.video.media import number, picture, write
from vtoken.images import open_image
from vtoken.video import Limits, LiveReader, VideoError, at_fps, open_video, sample_fps, sample_uniform

ROOT = Path(__file__).parents[2]


def png(width: int, height: int) -> bytes:
    """A sound header of one-bit pixels and few of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(2000)))
        + chunk(b"IEND", b"")
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
    data = (
        write(tmp_path / "a.ts", 8).read_bytes() + write(tmp_path / "b.ts", 8, size=(640, 408)).read_bytes()
    )
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
    with (
        open_video(path, limits=Limits(frames=59)) as video,
        pytest.raises(VideoError, match="more than 59 frames"),
    ):
        video.get_frames([0])


@pytest.mark.parametrize(
    "hoard", [list, lambda v: [f.image for f in v], lambda v: list(at_fps(v, 25)), sorted]
)
def test_pictures_that_are_held(tmp_path, hoard):
    """One iteration gives as many as it likes, and its caller holds as many as fit."""
    hoard = (lambda v: sorted(v, key=lambda f: f.index)) if hoard is sorted else hoard
    limits = Limits(nbytes=40 * 640 * 408 * 3)
    with open_video(many(tmp_path), limits=limits) as video:
        for _ in range(2):
            with pytest.raises(VideoError, match=r"frames take .* GiB.*limits=Limits\(nbytes=None\)"):
                hoard(video)
            assert sum(f.index for f in video) == 59 * 30  # what is let go counts no more
        window = []
        for frame in video:
            window = [*window[-38:], frame]
        assert window[-1].index == 59
    with open_video(many(tmp_path), limits=Limits(nbytes=None)) as video:
        assert len(list(video)) == 60


def growing(path: Path, codec: str, large: tuple[int, int] = (1280, 816)) -> Path:
    """8 pictures of 128 x 48, as the header says, then 8 that are larger; the codec's own data say so."""
    base, options = Fraction(1, 25), {"x264-params": "repeat-headers=1"} if codec == "libx264" else {}

    def encoded(size, start):
        context = av.CodecContext.create(codec, "w")
        context.width, context.height, context.pix_fmt, context.time_base = *size, "yuv420p", base
        context.gop_size, context.options = 4, options
        for i in range(8):
            frame = av.VideoFrame.from_ndarray(picture(i, size), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = start + i, base
            yield from context.encode(frame)
        yield from context.encode(None)

    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = 128, 48, "yuv420p", base
        for size, start in (((128, 48), 0), (large, 8)):
            for packet in encoded(size, start):
                packet.stream, packet.time_base = stream, base
                out.mux(packet)
    return path


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("b.mkv", "libx264"),
        ("c.mkv", "libvpx"),
        ("d.webm", "libvpx-vp9"),
        ("e.mp4", "libvpx-vp9"),
    ],
)
def test_decord_gets_no_picture_that_may_be_too_large(tmp_path, name, codec):
    path, few = growing(tmp_path / name, codec), Limits(pixels=128 * 48)
    with open_video(path) as video:
        assert {f.image.shape for f in video.get_frames(range(16))} == {(48, 128, 3), (816, 1280, 3)}
        assert video.backend == "pyav"
    with open_video(path, limits=few) as video:
        assert {f.image.shape for f in video.get_frames(seconds=[0, 0.2, 0.5])} == {
            (48, 128, 3)
        } and video.damage
    with pytest.raises(VideoError, match=r"no bound on pixels.*limits=Limits\(pixels=None\)"):
        open_video(path, "decord", limits=few)
    with open_video(path, "decord", limits=Limits(pixels=None)) as video:
        assert video.backend == "decord"


@pytest.mark.parametrize("codec", ["libx264", "libvpx"])
def test_decord_serves_pictures_of_one_size(tmp_path, codec):
    path = growing(tmp_path / "a.mkv", codec, large=(128, 48))
    with open_video(path, "decord", limits=Limits(pixels=128 * 48)) as video:
        assert video.backend == "decord" and [number(f.image) for f in video.get_frames([3, 11])] == [3, 3]


def test_time(tmp_path):
    path = write(tmp_path / "a.ts", 8)
    for use in (list, lambda v: v.get_frames([0]), lambda v: sample_uniform(v, 2)):
        message = r"takes more than 1e-09 s.*limits=Limits\(seconds=None\)"
        with (
            open_video(path, "pyav", limits=Limits(seconds=1e-9)) as video,
            pytest.raises(VideoError, match=message),
        ):
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
    """In a process of its own, because a process remembers its largest size: MB beyond what a sound video
    takes.
    """
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) < 400
