"""Live reading from Python's own sources: queue, drops, clocks, reconnection, shutdown."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref

import numpy as np
import pytest

from tests.video.media import in_time, number, picture
from vtoken.video import Frame, LiveReader, VideoError, VideoReader, open_video
from vtoken.video.buffer import Buffer


def frames(count: int, fps: float = 25.0, start: int = 0):
    for i in range(start, start + count):
        yield Frame(picture(i % 256), i / fps, i)


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("vtoken live")}


@pytest.fixture(autouse=True)
def _no_thread_left():
    yield
    assert not threads()


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.002)


def ascending(got: list[Frame]) -> None:
    assert all(b.seconds > a.seconds and b.index > a.index for a, b in itertools.pairwise(got))


def test_everything_is_read_where_nothing_is_dropped():
    with LiveReader(frames(50), speed=None, drop=False, queue=3) as live:
        assert isinstance(live, VideoReader)
        got = in_time(lambda: list(live))
        assert live.ended and live.read() is None
        stats = live.stats
    assert [number(f.image) for f in got] == [f.index for f in got] == list(range(50))
    assert [f.seconds for f in got] == pytest.approx([i / 25 for i in range(50)])
    assert (stats.read, stats.kept, stats.dropped, stats.reconnects, stats.error) == (50, 50, 0, 0, None)


def test_the_oldest_frames_are_dropped():
    with LiveReader(frames(50), speed=None, queue=4) as live:
        until(lambda: live.stats.read == 50 and not live.stats.connected)
        assert [f.index for f in live] == [46, 47, 48, 49]
        assert live.stats.dropped == 46


def test_the_newest_frame():
    with LiveReader(frames(50), speed=None, queue=4) as live:
        until(lambda: not live.stats.connected and live.stats.read == 50)
        assert live.read(newest=True).index == 49
        assert live.read() is None and live.ended and live.stats.dropped == 49


def test_bytes_are_bounded_whatever_the_size_of_a_frame():
    sizes = [(10, 10), (400, 400), (50, 50), (1000, 1000), (20, 20), (20, 20)]
    pictures = [Frame(np.zeros((*s, 3), np.uint8), float(i), i) for i, s in enumerate(sizes)]
    buffer, held = Buffer(100, 100_000, drop=True), []
    for frame in pictures:
        buffer.put(frame)
        held.append(sum(f.image.nbytes for f in buffer._waiting))
        assert held[-1] <= max(100_000, frame.image.nbytes)
    assert buffer.dropped == 4
    assert [buffer.take(0).index for _ in range(2)] == [4, 5] and buffer.take(0) is None


def test_dropped_frames_are_forgotten():
    alive: set[int] = set()

    def source():
        for i in range(3000):
            image = np.zeros((8, 8, 3), np.uint8)
            alive.add(i)
            weakref.finalize(image, alive.discard, i)
            yield Frame(image, float(i), i)

    with LiveReader(source(), speed=None, queue=5) as live:
        until(lambda: live.stats.read == 3000)
        gc.collect()
        assert len(alive) <= 8


def test_thinning_happens_before_conversion():
    with LiveReader(frames(100), fps=5, speed=None, drop=False) as live:
        got = in_time(lambda: list(live))
        assert live.fps == 5
    assert [f.index for f in got] == list(range(0, 100, 5))
    assert live.stats.read == 100 and live.stats.kept == 20


@pytest.mark.parametrize("speed", [1.0, 4.0])
def test_recordings_play_at_their_speed(speed):
    start = time.monotonic()
    with LiveReader(frames(6, fps=20), speed=speed, drop=False) as live:
        assert len(in_time(lambda: list(live))) == 6
    assert time.monotonic() - start >= 0.25 / speed


def test_ten_disconnections():
    calls = itertools.count()

    def camera():
        first = next(calls) * 5
        yield from ((picture(i), 1000.0 - first + (i - first) / 25) for i in range(first, first + 5))
        raise ConnectionError("unplugged")

    with LiveReader(camera, backoff=0.001, retries=2, drop=False) as live:
        got = in_time(lambda: [live.read() for _ in range(55)])
        assert live.stats.reconnects >= 10 and live.stats.error == "unplugged"
    assert [number(f.image) for f in got] == list(range(55))
    ascending(got)


def test_a_source_that_never_answers_is_given_up():
    calls = itertools.count(1)

    def camera():
        raise ConnectionError(f"refused {next(calls)}")

    with LiveReader(camera, backoff=0.001, retries=4) as live:
        with pytest.raises(VideoError, match="no picture in 5 tries; the last: refused 5"):
            in_time(live.read)
        with pytest.raises(VideoError, match="no picture"):
            list(live)
        assert live.stats.reconnects == 4


def test_it_waits_longer_between_tries():
    at = []

    def camera():
        at.append(time.monotonic())
        raise ConnectionError("refused")

    with LiveReader(camera, backoff=0.02, retries=3) as live, pytest.raises(VideoError):
        in_time(live.read)
    gaps = np.diff(at)
    assert len(gaps) == 3 and all(gap >= 0.02 * 2**i * 0.95 for i, gap in enumerate(gaps))


def test_closing_interrupts_the_wait_for_the_next_try():
    def camera():
        raise ConnectionError("refused")

    live = LiveReader(camera, backoff=20, retries=None)
    until(lambda: live.stats.error)
    start = time.monotonic()
    live.close()
    assert time.monotonic() - start < 5


def test_closing_interrupts_pacing_and_a_full_queue():
    paced = LiveReader(frames(3, fps=0.01))
    full = LiveReader(frames(100), speed=None, queue=2, drop=False)
    until(lambda: paced.stats.read == 2 and full.stats.kept >= 3)
    start = time.monotonic()
    paced.close()
    full.close()
    assert time.monotonic() - start < 5
    assert full.read() is None and full.ended


def test_closing_ends_a_read_that_waits():
    hold = threading.Event()

    def source():
        yield from frames(1)
        hold.wait(20)

    live = LiveReader(source(), timeout=5)
    assert in_time(live.read).index == 0
    assert live.read(timeout=0.01) is None and not live.ended
    reading = threading.Thread(target=lambda: live.read())
    reading.start()
    threading.Timer(0.1, hold.set).start()
    live.close()
    reading.join(10)
    assert not reading.is_alive()


def test_a_source_that_blocks_for_ever_is_left_behind_with_a_warning():
    hold = threading.Event()

    def source():
        hold.wait(30)
        yield from frames(1)

    live = LiveReader(source(), timeout=0.05)
    with pytest.warns(RuntimeWarning, match="left behind"):
        live.close()
    hold.set()
    until(lambda: not threads())


def test_an_iterable_that_breaks():
    def source():
        yield from frames(3)
        raise KeyError("lost")

    with LiveReader(source(), speed=None, drop=False) as live:
        got = []
        with pytest.raises(VideoError, match=r"'source' broke off: KeyError: 'lost'"):
            in_time(lambda: got.extend(live))
        assert [f.index for f in got] == [0, 1, 2] and live.stats.read == 3 and live.stats.reconnects == 0


def test_clocks_that_jump():
    def camera():
        for t in (0, 0.04, 0.08, 5000, 5000.04, 0, 0.04, 0.02, 0.08):
            yield picture(1), t

    with LiveReader(camera, drop=False) as live:
        got = in_time(lambda: list(live))
        stats = live.stats
    ascending(got)
    assert len(got) == 8 and got[-1].seconds < 10
    assert (stats.jumps, stats.late) == (2, 1)


def test_pictures_without_times():
    with LiveReader([picture(i) for i in range(4)], speed=None, drop=False) as live:
        assert [f.seconds for f in in_time(lambda: list(live))] == pytest.approx([0, 0.04, 0.08, 0.12])


def test_sizes_that_change_pass_through():
    sizes = [(48, 128), (96, 256), (20, 30)]
    with LiveReader([np.zeros((*s, 3), np.uint8) for s in sizes], speed=None, drop=False) as live:
        assert [f.image.shape[:2] for f in in_time(lambda: list(live))] == sizes


@pytest.mark.parametrize(
    "item",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), "text", None, b"bytes"],
)
def test_what_is_no_picture(item):
    with LiveReader([item], speed=None) as live, pytest.raises(VideoError, match="a frame is"):
        in_time(live.read)


def test_the_synthetic_stream_and_other_readers():
    with LiveReader("synthetic://3?fps=4", speed=None, drop=False) as live:
        got = [in_time(live.read) for _ in range(5)]
        assert [f.seconds for f in got] == [0, 0.25, 0.5, 0.75, 1.0] and live.fps == 4
    with (
        open_video("synthetic://3?fps=4&frames=5") as reader,
        LiveReader(reader, speed=None, drop=False) as live,
    ):
        again = in_time(lambda: list(live))
    assert all((a.image == b.image).all() for a, b in zip(got, again)) and len(again) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        dict(fps=0),
        dict(queue=0),
        dict(timeout=-1),
        dict(backoff=float("inf")),
        dict(speed=0),
        dict(growing=True),
    ],
)
def test_arguments_out_of_range(wrong):
    with pytest.raises(VideoError, match=r"above 0|file on disk|finite number"):
        LiveReader("rtsp://127.0.0.1:9/x", **wrong)


def test_frames_that_have_passed_are_gone():
    with LiveReader(frames(2), speed=None) as live, pytest.raises(VideoError, match="not picked"):
        live.get_frames([0])


@pytest.mark.parametrize("missing", ["/none/clip.mp4", "/tmp", 77, None, 1.5])
def test_what_does_not_exist_is_said_at_once(missing):
    with pytest.raises(VideoError, match=r"no such file|directory|cannot open|a path"):
        LiveReader(missing)
