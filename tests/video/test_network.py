"""Live network sources: sockets, HTTP, HLS and RTSP on the loopback, and scripted cameras."""

from __future__ import annotations

import http.server
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from fractions import Fraction

import av
import pytest

from tests.video.media import in_time, number, picture, write
from tests.video.servers import BITSTREAM, later, read_all, serving
from tests.video.test_live import _no_thread_left, ascending, until  # noqa: F401
from vtoken.video import LiveReader, VideoError, open_video


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> bytes:
    return write(tmp_path_factory.mktemp("source") / "s.ts", 40, **BITSTREAM).read_bytes()


def test_a_connection_that_breaks_ten_times(stream):
    """Each connection brings five pictures, from a key frame on, and is cut within a packet."""
    units = [stream[i : i + 188] for i in range(0, len(stream), 188)]
    half = b"".join(units[: len(units) // 3])

    def answer(connection: socket.socket, count: int) -> None:
        connection.sendall(half[: -100 if count < 10 else None])

    with serving(answer) as port:
        live = LiveReader(f"tcp://127.0.0.1:{port}", backoff=0.005, timeout=5, drop=False)
        with live:
            got, shown = [], []
            while live.stats.reconnects < 10:
                got.append(in_time(live.read))
                shown.append(number(got[-1].image))
    ascending(got)
    assert shown.count(0) >= 10 and live.stats.error
    runs = [b == a + 1 or b == 0 for a, b in itertools.pairwise(shown)]
    assert all(runs), shown


def test_a_connection_that_freezes_is_made_again(stream):
    hold = threading.Event()

    def answer(connection: socket.socket, count: int) -> None:
        connection.sendall(stream[: len(stream) // 2])
        if count == 0:
            hold.wait(60)
        connection.sendall(stream[len(stream) // 2 :])

    with serving(answer) as port:
        how = dict(backoff=0.01, timeout=1.5, drop=False, queue=1000)
        with LiveReader(f"tcp://127.0.0.1:{port}", **how) as live:
            until(lambda: live.stats.reconnects)
            assert live.stats.error == "no data within the time-out"
            hold.set()
            got = in_time(lambda: [live.read() for _ in range(50)])
    ascending(got)


def test_a_stream_of_garbage_between_two_of_pictures(stream):
    def answer(connection: socket.socket, count: int) -> None:
        connection.sendall(os.urandom(40_000) if count % 2 else stream)

    with (
        serving(answer) as port,
        LiveReader(f"tcp://127.0.0.1:{port}", backoff=0.005, timeout=5, drop=False) as live,
    ):
        got = in_time(lambda: [live.read() for _ in range(90)])
    ascending(got)
    assert {number(f.image) for f in got} <= set(range(40))


class Script:
    """A container that does what it is told: pictures by number and time, and what can go wrong with them."""

    format, duration = None, None

    def __init__(self, *acts):
        self.acts = list(acts)

    def demux(self, stream):
        while self.acts:
            act = self.acts[0] if callable(self.acts[0]) else self.acts.pop(0)
            if isinstance(act, Exception):
                raise act
            yield act() if callable(act) else act

    def close(self):
        self.acts = []


class Packet:
    def __init__(self, *frames, error=None):
        self.frames, self.error = frames, error

    def decode(self):
        if self.error:
            raise self.error
        return list(self.frames)


def shot(i: int, tick: int | None) -> Packet:
    frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
    frame.pts, frame.time_base = tick, Fraction(1, 25)
    return Packet(frame)


def wrong(text: str) -> av.error.InvalidDataError:
    return av.error.InvalidDataError(av.error.tag_to_code(b"INDA"), text)


BAD = Packet(error=wrong("bad packet"))
SILENT = av.error.ExitError(av.error.tag_to_code(b"EXIT"), "exit")


@pytest.mark.parametrize(
    ("scripts", "shown", "error"),
    [
        ([[shot(0, 0), BAD, BAD, shot(1, 3)]], [0, 1], "ended at its source"),
        ([[shot(0, 0), wrong("lost"), shot(1, 3)]], [0, 1], "ended at its source"),
        ([[shot(0, 0), *[wrong("lost")] * 70, shot(1, 3)]], [0], "nothing but damaged data"),
        ([[shot(0, 0), SILENT], [shot(1, 0)]], [0, 1], "no picture in 3 tries"),
        (
            [[shot(0, 0), ConnectionResetError("reset")], [shot(1, 90)], [BAD], [shot(2, 5)]],
            [0, 1, 2],
            "no picture in 3 tries",
        ),
        ([[shot(0, 0), lambda: BAD]], [0], "no picture within 0.2 s"),
        ([[shot(0, 9), shot(1, 8), shot(2, 7), shot(3, 10)]], [0, 3], "ended"),
        (
            [[shot(0, 0), shot(1, 10**6), shot(2, 10**6 + 1), shot(3, 5), shot(4, 6)]],
            [0, 1, 2, 3, 4],
            "ended",
        ),
        ([[shot(0, None), shot(1, None), shot(2, 80), shot(3, 81)]], [0, 1, 2, 3], "ended"),
        ([[shot(0, -50), shot(1, -49), shot(2, 0)]], [0, 1, 2], "ended"),
    ],
)
def test_what_a_camera_may_do(monkeypatch, scripts, shown, error):
    connections = iter([*scripts, *([[BAD]] * 9)])

    class Stream:
        average_rate = guessed_rate = 25

    monkeypatch.setattr(
        "vtoken.video.live_feeds.open_container", lambda *_, **__: (Script(*next(connections)), Stream)
    )
    live = LiveReader(
        "rtsp://camera/1", timeout=0.2, retries=2 * (len(scripts) > 1), backoff=0.001, drop=False
    )
    got = []
    with live:
        while len(got) < len(shown):
            got.append(in_time(live.read))
        with pytest.raises(VideoError, match=error):
            in_time(live.read)
    ascending(got)
    assert [number(f.image) for f in got] == shown and live.stats.read >= len(shown)


@pytest.fixture
def site(tmp_path):
    """A folder and the address under which a small web server shows it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def __init__(self, *args, **how):
            super().__init__(*args, directory=str(tmp_path), **how)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = later(server.serve_forever)
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def test_a_file_of_the_web(site):
    folder, address = site
    write(folder / "a.mkv", 24)
    got, live = read_all(f"{address}/a.mkv")
    assert [number(f.image) for f in got] == list(range(24)) and live.stats.reconnects == 0

    def work():
        with open_video(f"{address}/a.mkv") as reader:
            return [number(f.image) for f in reader], reader.backend, reader.why

    shown, backend, why = in_time(work)
    assert shown == list(range(24)) and backend == "pyav" and "PyAV" in why
    with pytest.raises(VideoError, match="decord reads files only"):
        open_video(f"{address}/a.mkv", "decord")
    with pytest.raises(VideoError, match="404"):
        in_time(lambda: open_video(f"{address}/none.mkv"))


def test_hls(site):
    folder, address = site
    container = {"hls_time": "0.3", "hls_list_size": "0"}
    write(
        folder / "live.m3u8",
        40,
        format="hls",
        container=container,
        between=0,
        options={"tune": "zerolatency"},
    )
    assert len(list(folder.glob("*.ts"))) > 2
    got, live = read_all(f"{address}/live.m3u8")
    assert [number(f.image) for f in got] == list(range(40)) and live.stats.reconnects == 0


PUSH = """
import sys, time
from tests.video.media import write

def slowly():
    for i in range(40):
        yield i
        time.sleep(0.005)

options = dict(container={"rtsp_transport": "tcp"}, options={"tune": "zerolatency"})
write(sys.argv[1], slowly(), format="rtsp", group=4, between=0, **options)
"""


def test_rtsp():
    """The reader listens; a camera pushes to it, goes away and comes back."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"rtsp://127.0.0.1:{probe.getsockname()[1]}/live"
    listen = {"rtsp_flags": "listen", "listen_timeout": "4"}
    live = LiveReader(address, options=listen, timeout=5, retries=None, backoff=0.01, queue=1000, drop=False)

    def push() -> None:
        # a process of its own: PyAV holds the interpreter's lock while it waits for the other side
        deadline, done = time.monotonic() + 60, False
        while not done and time.monotonic() < deadline:
            done = subprocess.run([sys.executable, "-c", PUSH, address], capture_output=True).returncode == 0

    with live:
        for visit in (1, 2):
            later(push).join(70)
            until(lambda least=visit * 20: live.stats.kept >= least and not live.stats.connected, 60)
        got = [live.read(0) for _ in range(live.stats.kept)]
    ascending(got)
    shown = [number(f.image) for f in got]
    again = [i for i, (a, b) in enumerate(itertools.pairwise(shown), 1) if b <= a]
    assert len(again) == 1 and shown[0] < 10 and shown[again[0]] < 10


def test_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never says a word
        address = f"http://127.0.0.1:{server.getsockname()[1]}/v.ts"
        with pytest.raises(VideoError, match=r"no answer within 0\.3 s"):
            in_time(lambda: open_video(address, timeout=0.3))
        live = LiveReader(address, timeout=0.3, retries=1, backoff=0.01)
        with live, pytest.raises(VideoError, match="in 2 tries"):
            in_time(live.read)
