"""Times: variable rates, offsets, jumping clocks; frame sampling; rotated pictures."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from tests.video.media import SIZE, number, picture, write
from vtoken.video import (
    Frame,
    SyntheticReader,
    VideoError,
    VideoReader,
    at_fps,
    open_video,
    sample_fps,
    sample_uniform,
    uniform_indices,
)
from vtoken.video.frame_times import Clock


@pytest.mark.parametrize(
    ("n", "total"), [(1, 9), (2, 9), (3, 10), (8, 100), (7, 7), (9, 4), (64, 1000), (5, 6)]
)
def test_uniform_indices(n, total):
    ends = uniform_indices(total, n)
    reference = np.linspace(0, total - 1, min(n, total)).astype(int).tolist() if n > 1 else [0]
    assert ends == reference and len(set(ends)) == min(n, total)
    middle = uniform_indices(total, n, "middle")
    assert middle == [int((i + 0.5) * total / min(n, total)) for i in range(min(n, total))]


@pytest.mark.parametrize("wrong", [(0, 4), (4, 0), (-1, 1)])
def test_uniform_indices_of_nothing(wrong):
    with pytest.raises(VideoError, match="at least 1"):
        uniform_indices(*wrong)
    with pytest.raises(VideoError, match="'ends' or 'middle'"):
        uniform_indices(4, 2, "start")


TICKS = [0, 3, 4, 10, 11, 12, 31, 50, 52, 75, 76, 99]  # hundredths of a second


@pytest.fixture(scope="module")
def variable(tmp_path_factory):
    path = tmp_path_factory.mktemp("times") / "v.mp4"
    return write(path, len(TICKS), times=[t + 40 for t in TICKS], base=Fraction(1, 100))


@pytest.mark.parametrize("fps", [1, 3, 10, 24.5, 200])
def test_sampling_by_time_is_exact(variable, fps):
    with open_video(variable) as reader:
        shown = sample_fps(reader, fps, end=1.0)
        ticks = [k / fps for k in range(int(np.ceil(fps - 1e-9)))]
        expected = [max(i for i, t in enumerate(TICKS) if t / 100 <= tick + 1e-6) for tick in ticks]
        assert [number(f.image) for f in shown] == [f.index for f in shown] == expected
        passing = [f.index for f in at_fps(reader, fps)]
        slots = [int(t / 100 * fps + 1e-6) for t in TICKS]
        assert passing == [i for i, slot in enumerate(slots) if i == 0 or slot > slots[i - 1]]


def test_a_span_of_time(variable):
    with open_video(variable) as reader:
        assert [f.index for f in sample_fps(reader, 10, start=0.1, end=0.5)] == [3, 5, 5, 6]
        assert [f.index for f in sample_uniform(reader, 4)] == [0, 3, 7, 11]
        for start, end in ((0.5, 0.5), (-1, 1), (2, 1), (float("nan"), 1)):
            with pytest.raises(VideoError, match=r"cannot sample|finite number"):
                sample_fps(reader, 1, start, end)
        for fps in (0, -2, float("nan"), float("inf")):
            with pytest.raises(VideoError, match=r"above 0|finite number"):
                sample_fps(reader, fps)
            with pytest.raises(VideoError, match=r"above 0|finite number"):
                at_fps(reader, fps)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (dict(indices=[12]), "no frame 12, only frames 0 to 11"),
        (dict(indices=[-1]), "no frame -1"),
        (dict(indices=[1.5]), "integer"),
        (dict(seconds=[-0.1]), "outside"),
        (dict(seconds=[99.0]), "outside"),
        (dict(seconds=[float("nan")]), "outside"),
        (dict(), "either indices or seconds"),
        (dict(indices=[0], seconds=[0.0]), "either indices or seconds"),
    ],
)
def test_frames_that_do_not_exist(variable, ask, message):
    with open_video(variable) as reader, pytest.raises(VideoError, match=message):
        reader.get_frames(**ask)


def test_no_frames_asked_for(variable):
    with open_video(variable) as reader:
        assert reader.get_frames([]) == reader.get_frames(seconds=[]) == []
        assert reader.get_frames(np.array([3, 1]))[0].index == 3


def test_sound_that_starts_first_is_the_beginning(tmp_path):
    late = write(tmp_path / "late.mkv", 10, times=range(25, 35), audio="pcm_s16le")
    with open_video(late) as reader:
        assert [round(f.seconds, 3) for f in reader][:2] == [1.0, 1.04]
        assert [f.index for f in reader.get_frames(seconds=[0.0, 0.5, 1.05])] == [0, 0, 1]


TURNS = {90: 1, 180: 2, 270: 3, -90: 3}  # counterclockwise


@pytest.mark.parametrize("backend", ["pyav", "auto"])
@pytest.mark.parametrize("degrees", TURNS)
def test_rotated_video_is_turned_upright(tmp_path, degrees, backend):
    path = write(tmp_path / "r.mp4", 5, rotation=degrees)
    with open_video(path, backend) as reader:
        images = [f.image for f in reader] + [f.image for f in reader.get_frames([3])]
        assert reader.backend == "pyav"
    sideways = degrees % 180 == 90
    assert images[0].shape == ((SIZE[0], SIZE[1], 3) if sideways else (SIZE[1], SIZE[0], 3))
    back = [np.ascontiguousarray(np.rot90(image, -TURNS[degrees])) for image in images]
    assert [number(image) for image in back] == [0, 1, 2, 3, 4, 3]
    with pytest.raises(VideoError, match="rotated"):
        open_video(path, "decord")


@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)])
def test_mirrored_video(tmp_path, matrix):
    import struct

    path = write(tmp_path / "m.mp4", 2)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    a, b, c, d = (x << 16 for x in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    with open_video(path) as reader:
        image = reader.get_frames([1])[0].image
    plain = np.asarray(picture(1), int)
    rows, columns = np.mgrid[: plain.shape[0], : plain.shape[1]]
    x, y = columns * matrix[0] + rows * matrix[2], columns * matrix[1] + rows * matrix[3]
    expected = np.zeros((np.ptp(y) + 1, np.ptp(x) + 1, 3), int)
    expected[y - y.min(), x - x.min()] = plain
    assert image.shape == expected.shape
    assert np.abs(image - expected).mean() < 12


def times(clock: Clock, given: list, passed: float = 0.0) -> list:
    out = [clock(t, passed) for t in given]
    return [None if t is None else round(t, 6) for t in out]


def test_clock():
    assert times(Clock(10), [5.0, 5.1, 5.3]) == [0, 0.1, 0.3]
    assert times(Clock(10), [None, None, None]) == [0, 0.1, 0.2]
    assert times(Clock(10), [5.0, None, 5.3]) == [0, 0.1, 0.3]
    assert times(Clock(10), [0, 0.2, 0.1, 0.2, 0.3]) == [0, 0.2, None, None, 0.3]
    assert times(Clock(10, keep=True), [0, 0.2, 0.2, 0.3]) == [0, 0.2, 0.25, 0.3]
    assert times(Clock(10, keep=True), [0, 0.5, 0, 0.1]) == [0, 0.5, 0.6, 0.7]
    assert times(Clock(10), [90, 90.1, 0, 0.1]) == [0, 0.1, 0.2, 0.3]  # set back
    assert times(Clock(10), [0, 0.1, 900, 900.1]) == [0, 0.1, 900, 900.1]  # a gap, in a recording
    assert times(Clock(10, leap=10), [0, 0.1, 900, 900.1]) == [0, 0.1, 0.2, 0.3]  # set forward, live
    assert times(Clock(10, leap=10), [0, 30, 60], passed=29) == [0, 30, 60]  # a slow source
    assert times(Clock(10, leap=10), [0, 0.1, 900, 900.1], passed=3) == [0, 0.1, 3.1, 3.2]
    clock = Clock(10)
    assert times(clock, [7, 7.1]) == [0, 0.1]
    clock.restart()
    assert times(clock, [3, 3.1], passed=0.5) == [0.6, 0.7]
    assert clock.jumps == 0


def test_synthetic_video():
    from vtoken.tiny.clips import stream

    with open_video("synthetic://5?fps=4&frames=9") as reader:
        assert isinstance(reader, VideoReader) and isinstance(reader, SyntheticReader)
        frames = list(reader)
        assert [f.index for f in frames] == list(range(9)) and frames[8].seconds == 2.0
        labelled, place = reader.labels(3)
        np.testing.assert_array_equal(frames[3].image, np.asarray(labelled.frame(place).image))
        np.testing.assert_array_equal(frames[3].image, np.asarray(stream(5, fps=4.0).frame(3).image))
        np.testing.assert_array_equal(reader.get_frames(seconds=[0.8])[0].image, frames[3].image)
        assert len(reader) == 9 and [f.index for f in sample_uniform(reader, 3)] == [0, 4, 8]
        with pytest.raises(VideoError, match="frames 0 to 8"):
            reader.get_frames([9])
    with SyntheticReader() as endless:
        assert endless.duration is None
        (late,) = endless.get_frames([10_000_000])
        assert late.image.shape == (96, 96, 3) and late.seconds == 5_000_000.0
        np.testing.assert_array_equal(late.image, endless.get_frames([10_000_000])[0].image)
        assert len(endless.labels(10_000_000)[0].moments(4095)) < 4096
        with pytest.raises(VideoError, match="length"):
            sample_uniform(endless, 3)
    for wrong in ("synthetic://x", "synthetic://1?speed=2", "synthetic://-1"):
        with pytest.raises(VideoError, match="synthetic"):
            open_video(wrong)


def test_a_frame_stands_for_its_picture():
    frame = Frame(picture(3), 0.5, 7)
    assert (frame.seconds, frame.index, number(frame.image)) == (0.5, 7, 3)
    with pytest.raises(AttributeError):
        frame.seconds = 1.0
