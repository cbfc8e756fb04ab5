"""Broken, odd and wrong sources: a clear sentence or recovery; no hang, no frame out of order."""

from __future__ import annotations

import io
import os
import random
import socket
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.video.media import SIZE, in_time, number, picture, write
from vtoken.video import VideoError, open_video, sample_uniform


def text(folder: Path, name: str = "clip.mp4") -> Path:
    path = folder / name
    path.write_text("This is not a video.\n" * 50)
    return path


def raw(folder: Path, data: bytes, name: str = "clip.mp4") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.ts")
    return folder / "pipe.ts"


def bound(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "s"))
    return folder / "s"


def tiff(folder: Path) -> bytes:
    Image.fromarray(picture(5)).save(folder / "whole.tiff", compression="tiff_lzw")
    return (folder / "whole.tiff").read_bytes()


def closed(folder: Path) -> object:
    file = write(folder / "a.mp4", 2).open("rb")
    file.close()
    return file


class Failing(io.BytesIO):
    """A file object whose disk is gone."""

    def read(self, size: int | None = -1) -> bytes:
        raise RuntimeError("the disk\nis gone")


def cut(folder: Path, share: float, suffix: str = ".mp4", **how) -> Path:
    whole = write(folder / f"whole{suffix}", **how).read_bytes()
    return raw(folder, whole[: int(len(whole) * share)], f"cut{suffix}")


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def noise(size: int) -> bytes:
    return random.Random(3).randbytes(size)


def cover(folder: Path) -> Path:
    """Sound with a picture on its sleeve."""
    path = folder / "song.mp3"
    with av.open(str(path), "w") as out:
        sound, sleeve = out.add_stream("mp3", rate=16000), out.add_stream("mjpeg", rate=1)
        sleeve.width, sleeve.height, sleeve.pix_fmt = *SIZE, "yuvj420p"
        sleeve.disposition = av.stream.Disposition.attached_pic
        out.mux(
            sleeve.encode(av.VideoFrame.from_ndarray(picture(1), format="rgb24").reformat(format="yuvj420p"))
        )
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16p", layout="mono")
        tone.sample_rate = 16000
        out.mux(sound.encode(tone))
        out.mux(sound.encode(None))
    return path


REFUSED = {
    "missing file": (lambda d: d / "none.mp4", "no such file"),
    "missing folder": (lambda d: d / "none" / "clip.mp4", "no such file"),
    "name that is too long": (lambda d: "x" * 5000, "cannot open"),
    "name with a null": (lambda d: "a\0b.mp4", "cannot open"),
    "empty name": (lambda d: "", "cannot open|directory"),
    "directory": (lambda d: d, "is a directory"),
    "empty file": (lambda d: raw(d, b""), r"is empty \(0 bytes\)"),
    "one byte": (lambda d: raw(d, b"\0"), "not a video"),
    "zeros": (lambda d: raw(d, bytes(100_000)), "not a video|no video|cannot open"),
    "noise": (lambda d: raw(d, noise(100_000)), "not a video|no video|cannot open"),
    "noise called ts": (lambda d: raw(d, noise(100_000), "a.ts"), "not a video|no video|cannot open"),
    "text called mp4": (text, "not a video"),
    "text called txt": (lambda d: text(d, "notes.txt"), "not a video"),
    "text called mkv": (lambda d: text(d, "clip.mkv"), "not a video"),
    "subtitles": (
        lambda d: raw(d, b"1\n00:00:01,000 --> 00:00:02,000\nHello\n", "s.srt"),
        "no video stream, only subtitle",
    ),
    "sound alone, mp4": (
        lambda d: write(d / "s.mp4", audio="aac", video=False),
        "no video stream, only audio",
    ),
    "sound alone, wav": (
        lambda d: write(d / "s.wav", audio="pcm_s16le", video=False),
        "no video stream, only audio",
    ),
    "sound with a sleeve": (cover, "no video stream, only audio"),
    "mp4 without its index": (lambda d: cut(d, 0.6), "index is cut off"),
    "header of an mp4": (
        lambda d: raw(d, b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41"),
        "not a video|cannot open",
    ),
    "header of an mkv": (lambda d: cut(d, 0.05, ".mkv"), "not a video|no video|no frame|cannot open"),
    "unknown scheme": (lambda d: "gopherx://host/clip", "knows no such protocol"),
    "scheme of the browser": (lambda d: "blob://host/clip", "knows no such protocol"),
    "nobody answers, tcp": (lambda d: f"tcp://127.0.0.1:{closed_port()}", "cannot open"),
    "nobody answers, http": (lambda d: f"http://127.0.0.1:{closed_port()}/v.mp4", "cannot open"),
    "nobody answers, rtsp": (lambda d: f"rtsp://127.0.0.1:{closed_port()}/live", "cannot open"),
    "no such camera": (lambda d: 77, "cannot open '/dev/video77'"),
    "a device that is none": (lambda d: "/dev/null", "cannot open"),
    "a device without end": (lambda d: "/dev/zero", "cannot open"),
    "a socket": (bound, "a socket or a block device"),
    "svg": (
        lambda d: raw(d, b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "a.svg"),
        "not a video",
    ),
    "svg called mp4": (
        lambda d: raw(d, b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        "not a video",
    ),
    "tiff without its pixels": (lambda d: raw(d, tiff(d)[:60], "a.tiff"), "not a video|no frame|cannot open"),
    "tiff without its directory": (
        lambda d: raw(d, tiff(d)[:9] + noise(500), "a.tiff"),
        "not a video|no frame|cannot open",
    ),
    "file object that is closed": (closed, "cannot read from the file object"),
    "file object that fails": (lambda d: Failing(), "cannot (read|open)"),
    "file of another machine": (lambda d: "file://host/a.mp4", "of another machine"),
    "long address": (lambda d: "data:video/mp4;base64," + "A" * 9000, "cannot open"),
    "pipe that nobody writes to": (fifo, "no data within"),
    "number": (lambda d: 1.5, "a path, an address or a binary file object"),
    "nothing": (lambda d: None, "a path, an address or a binary file object"),
    "text file object": (lambda d: text(d).open(), "mode 'rb'"),
    "unknown format": (lambda d: write(d / "a.mp4"), "knows no such protocol or format"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_clear_sentence(tmp_path, case):
    make, message = REFUSED[case]
    source, extra = make(tmp_path), dict(format="nonsense") if case == "unknown format" else {}

    def work():
        with open_video(source, timeout=0.5, **extra) as reader:
            list(reader)

    with pytest.raises(VideoError, match=message) as caught:
        in_time(work)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 6000
    if hasattr(source, "close"):
        source.close()


@pytest.mark.parametrize("backend", ["opencv", "", "AUTO"])
def test_unknown_backend(tmp_path, backend):
    with pytest.raises(VideoError, match="there are auto, pyav, decord, torchcodec"):
        open_video(write(tmp_path / "a.mp4", 2), backend)


def test_a_password_is_not_repeated():
    with pytest.raises(VideoError) as caught:
        in_time(lambda: open_video(f"rtsp://me:secret@127.0.0.1:{closed_port()}/live", timeout=1))
    assert "secret" not in str(caught.value)


def damaged(folder: Path, suffix: str, seed: int, count: int, **how) -> Path:
    """A file with `count` of its bytes changed, its head left whole."""
    data = bytearray(write(folder / f"whole{suffix}", **how).read_bytes())
    rng = random.Random(seed)
    last = data.rindex(b"moov") if suffix == ".mp4" else len(data)
    for _ in range(count):
        data[rng.randrange(min(1500, last // 4), last)] ^= rng.randrange(1, 256)
    return raw(folder, bytes(data), f"damaged{suffix}")


def holes(folder: Path) -> Path:
    """A transport stream that lost packets in bursts."""
    data = write(folder / "whole.ts", 40).read_bytes()
    units = [data[i : i + 188] for i in range(0, len(data), 188)]
    return raw(folder, b"".join(u for i, u in enumerate(units) if i < 8 or i % 17 not in (3, 4)), "holes.ts")


def joined(folder: Path, *parts: dict) -> Path:
    """Transport streams one after the other, each with times and a size of its own."""
    data = b"".join(write(folder / f"{i}.ts", **part).read_bytes() for i, part in enumerate(parts))
    return raw(folder, data, "joined.ts")


# what is made, and how many of its pictures must come out at the least
RECOVERED = {
    "mp4 cut in its data": (lambda d: cut(d, 0.9, container={"movflags": "faststart"}), 4),
    "mp4 in fragments, cut": (lambda d: cut(d, 0.6, container={"movflags": "frag_keyframe+empty_moov"}), 4),
    "mkv cut within a group": (lambda d: cut(d, 0.6, ".mkv"), 4),
    "transport stream cut within a group": (lambda d: cut(d, 0.7, ".ts"), 4),
    "flv cut within a group": (lambda d: cut(d, 0.6, ".flv"), 4),
    "avi cut within a group": (lambda d: cut(d, 0.8, ".avi", codec="mpeg4", frames=60), 4),
    "gif cut within a picture, which is damaged": (
        lambda d: cut(d, 0.6, ".gif", codec="gif", pixels="rgb8"),
        4,
    ),
    "bare H.264 cut within a picture": (lambda d: cut(d, 0.6, ".h264", format="h264"), 4),
    "webm cut within a group": (lambda d: cut(d, 0.6, ".webm", codec="libvpx"), 4),
    "mp4 with damaged packets": (lambda d: damaged(d, ".mp4", 1, 12, frames=40), 10),
    "mp4 with much damage": (lambda d: damaged(d, ".mp4", 2, 60, frames=40), 0),
    "mkv with damaged packets": (lambda d: damaged(d, ".mkv", 3, 12, frames=40), 0),
    "transport stream with damaged packets": (lambda d: damaged(d, ".ts", 4, 12, frames=40), 8),
    "webm with damaged packets": (lambda d: damaged(d, ".webm", 5, 12, frames=40, codec="libvpx"), 0),
    "avi with damaged packets": (lambda d: damaged(d, ".avi", 6, 12, frames=40, codec="mpeg4"), 0),
    "transport stream with lost packets": (holes, 8),
    "noise before a transport stream": (
        lambda d: raw(d, noise(188 * 3) + write(d / "a.ts").read_bytes(), "n.ts"),
        16,
    ),
    "noise behind an mp4": (lambda d: raw(d, write(d / "a.mp4").read_bytes() + noise(9000)), 24),
    "noise within a transport stream": (
        lambda d: raw(
            d,
            write(d / "a.ts").read_bytes() + noise(9000) + write(d / "b.ts", range(24, 48)).read_bytes(),
            "n.ts",
        ),
        40,
    ),
    "clock that jumps back": (
        lambda d: joined(d, dict(times=range(900, 924)), dict(frames=range(24, 40))),
        40,
    ),
    "clock that jumps forwards": (
        lambda d: joined(d, {}, dict(frames=range(24, 40), times=range(90_000, 90_016))),
        40,
    ),
    "size that changes": (
        lambda d: joined(d, {}, dict(frames=range(24, 40), size=(SIZE[0] * 2, 96), times=range(24, 40))),
        40,
    ),
    "clock and size that change twice": (
        lambda d: joined(d, *[dict(size=(SIZE[0], h)) for h in (48, 80, 64)]),
        72,
    ),
    "wrong suffix": (lambda d: write(d / "a.mkv").rename(d / "a.mp4"), 24),
    "no suffix": (lambda d: write(d / "a.mkv").rename(d / "a"), 24),
    "name with a colon": (lambda d: write(d / "rtsp:a%03d?.mp4"), 24),
    "name in another script": (lambda d: write(d / "видео 视频.mp4"), 24),
    "tiny picture": (lambda d: write(d / "a.mp4", size=(128, 16)), 24),
    "one still frame for an hour": (lambda d: write(d / "a.mkv", 2, times=[0, 90_000]), 2),
    "a thousand frames a second": (lambda d: write(d / "a.mkv", fps=1000), 24),
    "times a tick apart": (lambda d: write(d / "a.mp4", times=range(24), base=Fraction(1, 90_000)), 24),
}


@pytest.mark.parametrize("backend", ["pyav", "auto"])
@pytest.mark.parametrize("case", RECOVERED)
def test_recovery_in_order(tmp_path, case, backend):
    make, least = RECOVERED[case]
    path = make(tmp_path)

    def work():
        with open_video(path, backend) as reader:
            frames = list(reader)
            picked = sample_uniform(reader, 5)
            return frames, picked, len(reader)

    try:
        frames, picked, total = in_time(work)
    except VideoError as error:
        assert least == 0, error
        return
    assert least <= len(frames) <= total
    for one, two in pairwise(frames):
        assert two.seconds > one.seconds and two.index > one.index
    assert 1 <= len(picked) <= 5 and all(f.image.dtype == np.uint8 for f in picked)
    if "damage" not in case and "lost" not in case and "twice" not in case:
        shown = [number(np.ascontiguousarray(f.image[:, : SIZE[0]])) for f in frames]
        assert all(two > one for one, two in pairwise(shown))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "I;16", "CMYK"])
def test_a_still_image_is_one_frame(tmp_path, mode):
    image = Image.fromarray(picture(9))
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        image = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) << 8) + 200)
    else:
        image = image.convert(mode)
    image.save(path)

    def work():
        with open_video(path) as reader:
            return list(reader), len(reader), reader.get_frames(seconds=[0.0]), reader.duration

    frames, total, at_start, duration = in_time(work)
    assert total == 1 and duration > 0 and [number(f.image) for f in frames + at_start] == [9, 9]


def test_closed_reader(tmp_path):
    reader = open_video(write(tmp_path / "a.mp4", 4))
    going = iter(reader)
    next(going)
    reader.close()
    reader.close()
    for use in (lambda: next(going), lambda: list(reader), lambda: reader.get_frames([0])):
        with pytest.raises(VideoError, match="closed"):
            use()


def test_a_damaged_frame_is_not_replaced_unasked(tmp_path):
    path = write(tmp_path / "a.mkv", 24, between=0, group=8)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = next(p for i, p in enumerate(container.demux(video=0)) if i == 11)
        start, size = packet.pos, packet.size
    at = data.index(bytes(packet), start - 8)
    data[at : at + size] = bytes(size)
    path.write_bytes(data)
    with open_video(path, "pyav") as reader:
        with pytest.raises(VideoError, match=r"frame 11 .* is damaged"):
            reader.get_frames(indices=[2, 11])
        (nearest,) = reader.get_frames(seconds=[reader.table.seconds[11]])
        assert number(nearest.image) == nearest.index == 10
        assert reader.damage
        assert [f.index for f in sample_uniform(reader, 24)][:11] == list(range(11))
    with open_video(path) as reader:
        (frame,) = reader.get_frames(seconds=[0.04 * 2])
        assert number(frame.image) == 2
