"""Live sources on this machine: pipes and files, whole and growing."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from tests.video.media import in_time, number, write
from tests.video.servers import BITSTREAM, later, read_all
from tests.video.test_live import _no_thread_left, ascending  # noqa: F401
from vtoken.video import LiveReader, VideoError, open_video


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> bytes:
    return write(tmp_path_factory.mktemp("source") / "s.ts", 40, **BITSTREAM).read_bytes()


def test_a_pipe(stream):
    out, into = os.pipe()

    def feed():
        with os.fdopen(into, "wb") as file:
            for i in range(0, len(stream), 3000):
                file.write(stream[i : i + 3000])

    later(feed)
    with os.fdopen(out, "rb") as file:
        got, live = read_all(file)
    assert [number(f.image) for f in got] == list(range(40)) and live.stats.reconnects == 0


def test_a_named_pipe(stream, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Timer(0.1, lambda: path.write_bytes(stream)).start()
    got, _ = read_all(path)
    assert [number(f.image) for f in got] == list(range(40))
    later(lambda: path.write_bytes(stream))

    def work():
        with open_video(path, timeout=20) as reader:
            assert not reader.duration
            for use in (lambda: len(reader), lambda: reader.get_frames([0])):
                with pytest.raises((TypeError, VideoError), match="is a stream"):
                    use()
            return [number(f.image) for f in reader]

    assert in_time(work) == list(range(40))


def test_a_pipe_that_falls_silent(stream, tmp_path):
    out, into = os.pipe()
    os.write(into, stream[: len(stream) // 2 // 188 * 188])
    with (
        os.fdopen(out, "rb") as file,
        LiveReader(file, timeout=0.4, retries=1, backoff=0.01, drop=False) as live,
    ):
        got = []
        with pytest.raises(VideoError, match=r"no data within 0\.4 s"):
            in_time(lambda: got.extend(live))
        assert live.stats.reconnects == 1
        assert [number(f.image) for f in got] == list(range(len(got))) and len(got) > 5
    os.close(into)


@pytest.mark.parametrize("blocked", ["before the first byte", "within the stream"])
def test_closing_interrupts_a_pipe(stream, tmp_path, blocked):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    live = LiveReader(path, timeout=60)
    writer = None
    if blocked == "within the stream":
        writer = in_time(lambda: path.open("wb", buffering=0))
        writer.write(stream[: len(stream) // 2])
        in_time(lambda: live.read())
    start = time.monotonic()
    in_time(live.close)
    assert time.monotonic() - start < 5
    if writer:
        writer.close()


def test_a_pipe_of_garbage(tmp_path):
    out, into = os.pipe()
    later(lambda: (os.write(into, os.urandom(50_000)), os.close(into)))
    with os.fdopen(out, "rb") as file, pytest.raises(VideoError, match=r"not a video|cannot open|no video"):
        read_all(file, retries=2, backoff=0.01)


@pytest.mark.parametrize("suffix", [".ts", ".mkv", ".mp4"])
def test_a_growing_file(tmp_path, suffix):
    how = (
        dict(container={"movflags": "frag_keyframe+empty_moov+default_base_moof"}) if suffix == ".mp4" else {}
    )
    data = write(tmp_path / f"whole{suffix}", 40, **BITSTREAM, **how).read_bytes()
    path = tmp_path / f"growing{suffix}"
    path.touch()

    def grow():
        with path.open("ab", buffering=0) as file:
            for i in range(0, len(data), len(data) // 6):
                file.write(data[i : i + len(data) // 6])
                time.sleep(0.03)

    live = LiveReader(path, growing=True, timeout=4, drop=False)
    later(grow)
    with live:
        got = in_time(lambda: list(live), 60)
    assert [number(f.image) for f in got] == list(range(40))
    ascending(got)


def test_a_file_is_played_to_its_end(tmp_path):
    path = write(tmp_path / "a.mp4", 24)
    got, live = read_all(path, speed=None)
    assert [number(f.image) for f in got] == list(range(24)) and live.fps == 25 and live.backend == "pyav"
    got, _ = read_all(path, speed=None, fps=5)
    assert [f.index for f in got] == [0, 5, 10, 15, 20]
    with pytest.raises(VideoError, match="not a video"):
        read_all(write_text(tmp_path / "text.mp4"))


def write_text(path: Path) -> Path:
    path.write_text("text " * 99)
    return path


def test_a_file_cut_within_a_group_ends(tmp_path):
    data = write(tmp_path / "a.ts", 40).read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[: len(data) * 2 // 3])
    got, _ = read_all(tmp_path / "cut.ts", speed=None)
    assert 10 < len(got) < 40 and [number(f.image) for f in got] == sorted({number(f.image) for f in got})


@pytest.mark.parametrize("host", ["", "localhost", "LOCALHOST", "LocalHost"])
def test_this_machine_in_a_file_address(tmp_path, host):
    path = write(tmp_path / "a.mp4", 2)
    with open_video(f"file://{host}{path}") as video:
        assert len(video) == 2
