"""Whole files of every kind: each frame is the encoded one, at its time, for every way of reading."""

from __future__ import annotations

import io
import random
from fractions import Fraction

import numpy as np
import pytest

from tests.video.media import SIZE, in_time, number, write
from vtoken.video import Limits, VideoError, VideoReader, decord, open_video

JITTER = np.cumsum(random.Random(4).choices(range(1, 30), k=24)).tolist()
X265 = "log-level=none:pools=1:frame-threads=1"
VARIABLE = dict(times=JITTER, base=Fraction(1, 100))

# name: (suffix, how it is written); times are pts in units of `base`
KINDS = {
    "mp4": (".mp4", {}),
    "mp4 without B-frames": (".mp4", dict(between=0)),
    "mp4 with sound": (".mp4", dict(audio="aac")),
    "mp4 with open groups": (".mp4", dict(options={"x264-params": "open-gop=1:keyint=8:bframes=3"})),
    "mp4 with one key frame": (".mp4", dict(group=1000)),
    "mp4 in fragments": (".mp4", dict(container={"movflags": "frag_keyframe+empty_moov"})),
    "mp4, index first": (".mp4", dict(container={"movflags": "faststart"})),
    "mp4, variable rate": (".mp4", VARIABLE),
    "mp4 that starts late": (".mp4", dict(times=range(50, 74))),
    "mov": (".mov", {}),
    "mov, ProRes 10 bit": (".mov", dict(codec="prores_ks", pixels="yuv422p10le", group=1)),
    "mp4 with gradual refresh": (
        ".mp4",
        dict(options={"x264-params": "intra-refresh=1:keyint=7:bframes=3"}, group=99),
    ),
    "mp4, HEVC": (".mp4", dict(codec="libx265", options={"x265-params": X265 + ":open-gop=0"})),
    "mp4, HEVC with open groups": (
        ".mp4",
        dict(codec="libx265", options={"x265-params": X265 + ":open-gop=1:keyint=7"}),
    ),
    "mp4, AV1": (".mp4", dict(codec="libsvtav1", options={"preset": "12", "svtav1-params": "lp=1"})),
    "mp4, MPEG-4": (".mp4", dict(codec="mpeg4")),
    "mkv": (".mkv", {}),
    "mkv, variable rate": (".mkv", VARIABLE),
    "mkv that starts before zero": (".mkv", dict(times=range(-10, 14))),
    "mkv, FFV1 gray": (".mkv", dict(codec="ffv1", pixels="gray")),
    "mkv, FFV1 gray 16 bit": (".mkv", dict(codec="ffv1", pixels="gray16le")),
    "mkv, FFV1 with alpha": (".mkv", dict(codec="ffv1", pixels="yuva420p")),
    "mkv, 16 bit colour": (".mkv", dict(codec="ffv1", pixels="rgb48le")),
    "mkv without seek index": (".mkv", dict(container={"live": "1"})),
    "webm, VP8": (".webm", dict(codec="libvpx", options={"cpu-used": "8"})),
    "webm, VP8 with hidden frames": (
        ".webm",
        dict(codec="libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "8"}),
    ),
    "webm, VP9": (".webm", dict(codec="libvpx-vp9", options={"cpu-used": "8", "lag-in-frames": "8"})),
    "transport stream": (".ts", {}),
    "transport stream, MPEG-2": (".ts", dict(codec="mpeg2video")),
    "program stream": (".mpg", dict(codec="mpeg2video", format="mpeg")),
    "avi": (".avi", dict(codec="mpeg4")),
    "avi, MJPEG": (".avi", dict(codec="mjpeg", pixels="yuvj420p")),
    "flv": (".flv", {}),
    "gif": (".gif", dict(codec="gif", pixels="rgb8")),
    "animated png": (".apng", dict(codec="apng", pixels="rgb24")),
    "bare H.264": (".h264", dict(format="h264")),
    "odd size": (".mp4", dict(pixels="yuv444p", size=(SIZE[0] + 3, SIZE[1] + 5))),
    "one frame": (".mp4", dict(frames=1)),
    "two frames": (".mp4", dict(frames=2)),
}
COUNTED = ("bare H.264", "program stream")  # without times, or with one twice: frames are counted
DECORD = {
    *(
        "mp4",
        "mp4 without B-frames",
        "mp4 with sound",
        "mp4 with one key frame",
        "mp4, index first",
        "mp4, variable rate",
    ),
    *("mp4 that starts late", "mov", "mkv", "mkv, variable rate", "mkv that starts before zero"),
    *("webm, VP8", "webm, VP8 with hidden frames", "odd size", "one frame", "two frames"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("video"), {}

    def make(kind: str):
        if kind not in files:
            suffix, how = KINDS[kind]
            files[kind] = write(folder / f"{len(files)}{suffix}", **how)
        return files[kind]

    return make


def expected_times(kind: str) -> np.ndarray:
    how = KINDS[kind][1]
    frames = how.get("frames", 24)
    ticks = np.asarray(list(how.get("times", range(frames))), np.float64)
    return (ticks - ticks[0]) * float(how.get("base", Fraction(1, 25)))


def check(reader: VideoReader, kind: str) -> None:
    times, rng = expected_times(kind), random.Random(0)
    total = len(times)
    assert len(reader) == total
    read = list(reader)
    assert [number(f.image) for f in read] == [f.index for f in read] == list(range(total))
    seconds = np.asarray([f.seconds for f in read])
    first = seconds[0] if kind.startswith("avi") else 0.0  # AVI itself puts B-frames one frame late
    if kind == "program stream":
        times[-1] = (
            seconds[-1] if seconds[-2] < seconds[-1] else 0
        )  # libav gives the last frame the time of the one before
    np.testing.assert_allclose(seconds - first, times, atol=1.1e-3)  # Matroska rounds to milliseconds
    size = KINDS[kind][1].get("size", SIZE)
    assert {f.image.shape for f in read} == {(size[1], size[0], 3)}
    # at random, with repetitions, in one call and one by one
    picks = rng.choices(range(total), k=12)
    assert [number(f.image) for f in reader.get_frames(picks)] == picks
    for pick in picks[:4]:
        (frame,) = reader.get_frames(indices=[pick])
        assert (number(frame.image), frame.index, frame.seconds) == (pick, pick, seconds[pick])
        np.testing.assert_array_equal(frame.image, read[pick].image) if reader.backend == "pyav" else None
    # on screen: at its beginning, and until just before the next one begins
    ends = np.append(seconds[1:], seconds[-1] + 0.01)
    asked = [t for i in picks[:6] for t in (seconds[i], (seconds[i] + ends[i]) / 2, ends[i] - 1e-4)]
    assert [f.index for f in reader.get_frames(seconds=asked)] == [i for i in picks[:6] for _ in range(3)]
    assert reader.duration >= seconds[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_found(made, kind):
    def work():
        with open_video(made(kind), backend="pyav") as reader:
            check(reader, kind)
            assert not reader.damage
            if kind != "program stream":  # libav repeats the time of its last frame in most runs, not in all
                assert (reader.table.pts is None) == (kind in COUNTED)
            assert reader.fps == pytest.approx(25, rel=0.01) or kind == "mp4, variable rate"

    in_time(work)


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k][0] in (".mp4", ".mov", ".mkv", ".webm")])
def test_decord_is_as_exact_where_it_serves(made, kind):
    def work():
        if kind not in DECORD:
            with pytest.raises(VideoError, match=r"needs backend 'pyav'|decord cannot open"):
                open_video(made(kind), "decord")
            return
        with open_video(made(kind), "decord") as reader:
            check(reader, kind)
            assert reader.backend == "decord", "decord was chosen and then failed"

    in_time(work)


def test_decord_serves_no_long_files(made, monkeypatch):
    monkeypatch.setattr(decord, "_LONGEST", 20)
    with pytest.raises(VideoError, match="other frames in files of more than 20 frames"):
        open_video(made("mp4"), "decord")


@pytest.mark.parametrize("kind", ["mp4, AV1", "webm, VP9"])
def test_decord_is_exact_where_pictures_may_grow(made, kind):
    with open_video(made(kind), "decord", limits=Limits(pixels=None)) as reader:
        check(reader, kind)
        assert reader.backend == "decord"


@pytest.mark.parametrize("kind", ["transport stream", "avi", "flv", "gif", "mp4 in fragments"])
def test_decord_is_not_trusted_where_it_is_wrong(made, kind):
    with pytest.raises(ValueError, match=r"decord is not exact in .* needs backend 'pyav'"):
        open_video(made(kind), backend="decord")


@pytest.mark.parametrize(
    "kind", ["mp4, HEVC", "mp4 with open groups", "mp4 with gradual refresh", "mp4, MPEG-4"]
)
def test_decord_is_trusted_with_closed_groups_alone(made, kind):
    with pytest.raises(ValueError, match="closed group"):
        open_video(made(kind), backend="decord")


@pytest.mark.parametrize("kind", ["mp4", "transport stream", "mkv"])
def test_file_objects(made, kind):
    data = made(kind).read_bytes()
    with open_video(io.BytesIO(data)) as reader:
        check(reader, kind)
        assert reader.backend == "pyav"
    with open(made(kind), "rb") as file, open_video(file) as reader:
        check(reader, kind)


def test_picking_does_not_disturb_iteration(made):
    for kind in ("mp4, variable rate", "transport stream", "bare H.264"):
        with open_video(made(kind), backend="pyav") as reader:
            seen = []
            for frame in reader:
                seen.append(number(frame.image))
                if frame.index % 7 == 3:
                    assert [number(f.image) for f in reader.get_frames([20, 2])] == [20, 2]
            assert seen == list(range(24))
            one, two = iter(reader), iter(reader)
            pairs = [(next(one).index, next(two).index) for _ in range(5)]
            assert pairs == [(i, i) for i in range(5)]
